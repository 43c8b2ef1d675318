"""What a step holds in memory: measured, and predicted before it starts.

tracker          live bytes of any code on any device, by kind
simulate         the step without its data: what it holds, device and host, at each moment
meta             what an operation on tensors without data returns, remembered
counter          what a simulated step computes and moves
fakes            what takes the place of a GPU's own code there, of the host's AdamW, of exchanges
simulated_zero   what takes ZeRO's place there: what each stage keeps, and when
devices          the devices to plan for
"""
