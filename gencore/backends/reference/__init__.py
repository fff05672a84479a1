"""The definition of every op in plain PyTorch, in the precision of its inputs: for tests, and for derivatives without a
kernel. Those that make noise are for tests alone; the others are given it, and may be differentiated and compiled."""
