"""Scaled dot-product attention and the choice of its kernel.

Shapes: B batch, N query tokens, M key tokens, H heads, D head_dim. There is no mask: a query sees the whole window.
"""

from __future__ import annotations

import importlib
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lingbot_rt.errors import ConfigError, one_line
from lingbot_rt.models.kv_cache import KVCache

_SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
_PACKAGES = {"flash-attn2": "flash_attn", "flash-attn3": "flash_attn_interface", "flash-attn4": "flash_attn.cute"}
"""FlashAttention by generation: the module that has its ``flash_attn_func``."""

BACKENDS = ("auto", "sdpa", *_SDPA, *_PACKAGES)


def attend(q_BNHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor, backend: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(D)) v -> [B, N, H, D].

    ``sdpa`` lets torch choose its kernel. ``cudnn``, ``flash`` and ``math`` are torch's kernels of that name.
    ``flash-attn2`` to ``flash-attn4`` are the FlashAttention packages. ``auto``: see ``resolve_backend``.
    """
    if backend == "auto":
        backend = resolve_backend(backend, q_BNHD.device, q_BNHD.dtype)
    if backend in _PACKAGES:
        out = importlib.import_module(_PACKAGES[backend]).flash_attn_func(q_BNHD, k_BMHD, v_BMHD)
        return out[0] if isinstance(out, tuple) else out  # some versions return the softmax's sums too
    q, k, v = (x.transpose(1, 2) for x in (q_BNHD, k_BMHD, v_BMHD))
    if backend in _SDPA:
        with sdpa_kernel(_SDPA[backend]):
            out = F.scaled_dot_product_attention(q, k, v)
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2)


class WindowAttention:
    """Self-attention of a chunk over its session's window.

    Sequence parallelism changes nothing else: ``parallel`` replaces ``CausalDiT.window_attention`` by a subclass that
    has only some of the tokens, and exchanges them for heads around the kernel.
    """

    def own_tokens(self, x: Tensor, dim: int) -> Tensor:
        """The tokens of ``x``, which are its dimension ``dim``, that this process computes: all of them."""
        return x

    def all_tokens(self, own_BNK: Tensor, count: int) -> Tensor:
        """The inverse of ``own_tokens``: this process's tokens [B, n, K] -> all ``count`` tokens [B, N, K]."""
        return own_BNK

    def store(self, k_BNHD: Tensor, v_BNHD: Tensor, cache: KVCache, layer: int) -> None:
        """Writes the chunk's keys and values into the window. The context pass needs no more of the last layer."""
        cache.write(layer, k_BNHD, v_BNHD)

    def __call__(
        self, q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor, cache: KVCache, layer: int, backend: str
    ) -> Tensor:
        """Writes the chunk's keys and values, then attends to the visible window -> [B, N, H, D]."""
        cache.write(layer, k_BNHD, v_BNHD)
        return attend(q_BNHD, *cache.view(layer), backend)


@lru_cache
def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """``auto`` is cudnn in half precision on Hopper and later, else sdpa. Any other name stays as it is.

    On Hopper cuDNN's kernels are about 1.8 times as fast as torch's flash kernels, and read B N H D storage directly.
    """
    if backend != "auto":
        return backend
    half = dtype in (torch.bfloat16, torch.float16)
    on_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return "cudnn" if half and on_hopper else "sdpa"


def text_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The kernel for attention to the text: one of torch's, as these compile together with the code around them."""
    return resolve_backend("auto" if backend in _PACKAGES else backend, device, dtype)


def available_backends(device: torch.device) -> dict[str, str]:
    """Each backend -> ``ok``, or the error of running it on a tiny input."""
    found = {}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(1, 8, 2, 64, device=device, dtype=dtype)
    for backend in BACKENDS:
        try:
            attend(x, x, x, backend)
            found[backend] = "ok"
        except (ImportError, RuntimeError, AttributeError) as error:
            found[backend] = one_line(error)
    return found


def require_backend(backend: str, device: torch.device) -> None:
    """Raises ConfigError, with the backends that run, when ``backend`` does not run on ``device``."""
    found = available_backends(device)
    if found[backend] != "ok":
        working = ", ".join(name for name, state in found.items() if state == "ok")
        raise ConfigError(
            f"--attention-backend {backend} does not run on {device.type} ({found[backend]}); use one of: {working}",
            field="attention_backend",
        )
