"""The words that the texts of tasks are made of."""

_WORDS = """
anchor apple arrow badge basket beach bell bench bird boat bottle bridge brush bucket button camel
candle carpet castle chain chair circle cloud coat coin copper corner cotton crown desert dragon
drum eagle engine feather fence field finger flag flower forest fork garden gate glass glove grape
hammer harbor hat honey horse island jacket jewel kettle king kitchen ladder lake lamp lemon letter
lion market meadow mirror monkey moon mountain needle ocean orange oven paper parrot pencil piano
pillow planet pocket prince queen rabbit ribbon river rocket saddle sailor salt shadow shell silver
spoon stone sugar table tiger tower window
"""
WORDS = tuple(_WORDS.split())
"""Keys, the names of variables, and what lists are of; none of them stands in any other part of a
text."""

FILLER = (
    "The road was long.\n",
    "A door stood open.\n",
    "Leaves moved in the wind.\n",
    "Nobody came by.\n",
)
