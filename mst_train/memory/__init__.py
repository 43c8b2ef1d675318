"""What a step holds in memory: measured, and predicted before it starts.

tracker          live bytes of any code on any device, by kind
simulate         what a step holds, device and host, predicted without the device
simulated_step   the step without its data: what it holds at each moment
extrapolate      deep models and long sequences from steps of a few blocks and chunks
trace            what a step asks the allocator for, recorded and made that of a deeper model
allocator        how torch's caching allocator takes a GPU's memory
reserved         the two together: the memory that torch holds of a GPU
meta             what an operation on tensors without data returns, remembered
counter          what a simulated step computes and moves
fakes            what takes the place of a GPU's own code there, of the host's AdamW, of exchanges
simulated_zero   what takes ZeRO's place there: what each stage keeps, and when
devices          the devices to plan for
"""
