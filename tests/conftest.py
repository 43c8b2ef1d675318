"""What tests share: a small corpus and a configuration that trains on it in moments."""

import dataclasses
import io
import json
import os
import random

import pytest
import torch
from hypothesis import HealthCheck, settings

from mst_kernels import backend
from mst_train.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    WandbConfig,
)
from mst_train.data import load_tokenizer
from mst_train.data.tokenizer import Tokenizer

if not torch.cuda.is_available():
    # Read when triton is first imported, which other packages do as well.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The tests' arrays are too small for a second thread to be worth waiting for, here and in processes
# that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


# How long an example takes says how busy the machine is.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture(autouse=True)
def kernel_backend():
    """Each test starts with the default backend."""
    with backend("auto"):
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of text with something to learn: sentences of a small random grammar."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = random.Random(0)
    words = [
        "".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(2, 9)))
        for _ in range(400)
    ]
    followers = {word: generator.sample(words, 4) for word in words}
    for i in range(48):
        word, text = words[i], []
        for _ in range(375):
            text.append(word)
            word = generator.choice(followers[word])
        (folder / f"document_{i:02d}.txt").write_text(" ".join(text))
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Tokenizers and tokens, made once for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def like_llama(corpus):
    """A sentencepiece model with a space before, and a token at the beginning of, each text."""
    import sentencepiece  # which tests on a GPU do without

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(path.read_text() for path in corpus.iterdir()),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        add_dummy_prefix=True,
        bos_id=2,
        eos_id=1,
        unk_id=0,
        minloglevel=4,
    )
    return Tokenizer(model.getvalue(), "like llama")


@pytest.fixture(scope="session")
def bytes_with_bos(tmp_path_factory):
    """A tokenizer.json of bytes alone, with a token at the beginning of each text."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {symbol: 2 + number for number, symbol in enumerate(sorted(alphabet))}
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={"<bos>": 0, "<eos>": 1, **vocabulary}, merges=[])
    )
    made.add_special_tokens(["<bos>", "<eos>"])
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    folder = tmp_path_factory.mktemp("bytes")
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return load_tokenizer(folder / "tokenizer.json")


@pytest.fixture
def small_config(corpus, cache, tmp_path):
    """A run of a few steps, in its own folder."""
    return Config(
        run=RunConfig(name="small", dir=str(tmp_path / "run")),
        train=TrainConfig(steps=6, eval_every=3, eval_sequences=4),
        data=DataConfig(
            source=str(corpus),
            sequence_length=100,
            validation_fraction=0.05,
            tokenizer_vocab_size=512,
            cache_dir=str(cache),
        ),
        model=ModelConfig(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=88,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
        ),
        memory=MemoryConfig(policy="mst", mlp_chunk_tokens=32, head_chunk_tokens=32),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        checkpoint=CheckpointConfig(every=2, keep=2),
        logging=LoggingConfig(wandb=WandbConfig(mode="disabled")),
    )


@pytest.fixture
def change():
    """change(config, **{"train.steps": 8}): a copy of a configuration with other values."""

    def replace(config, **settings):
        for key, value in settings.items():
            group, _, rest = key.partition(".")
            if rest:
                value = replace(getattr(config, group), **{rest: value})
            config = dataclasses.replace(config, **{group: value})
        return config

    return replace
