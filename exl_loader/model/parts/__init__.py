"""The parts that layers are made of; one file has everything about a kind of part.

A part is made from config and checkpoint headers alone, by `model.builder`. From then on it
answers four questions: which weights it has (`specs`), which tensors of the workspace a step
needs for it (`workspace`), how its weights are read (`load`), and what it computes (`run`).
Importing a part imports neither PyTorch nor numpy, because plans are made without them.
"""
