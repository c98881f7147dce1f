"""The connection between machines: questions to each, and frames that go around a ring.

The first machine and the others are processes that exchange frames over torch.distributed's gloo.
This wing knows nothing of models. `address` and `frames` import without PyTorch; `connection`
(the first machine's side) and `station` (the side of every other machine) need it.
"""
