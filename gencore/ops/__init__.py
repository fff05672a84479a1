"""The kernels: functions of tensors, each one pass over memory, each a ``torch.library`` op."""

from gencore.backends.choice import backend as backend
from gencore.ops._explain import explain as explain
from gencore.ops.group_norm import group_norm as group_norm
from gencore.ops.normal import normal as normal
from gencore.ops.reparameterize import reparameterize as reparameterize
from gencore.ops.reparameterize import reparameterize_kl as reparameterize_kl
from gencore.ops.uniform import uniform as uniform

__all__ = ["group_norm", "normal", "reparameterize", "reparameterize_kl", "uniform"]
