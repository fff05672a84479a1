"""What runs an op: the compiled CPU kernels (:mod:`gencore.backends.cpu`), and the definition in plain PyTorch
(:mod:`gencore.backends.reference`). Only :mod:`gencore.ops` calls them."""
