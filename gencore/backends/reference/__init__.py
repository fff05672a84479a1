"""The definition of every op in plain PyTorch: slow, differentiable, in the precision of its inputs. For tests."""
