"""Scaled dot-product attention and the choice of its kernel.

Shapes: B batch, N query tokens, M key tokens, H heads, D head_dim. There is no mask: a query sees the whole window.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lingbot_rt.config import FLASH_ATTENTION
from lingbot_rt.errors import ConfigError, one_line
from lingbot_rt.models.kv_cache import KVCache
from lingbot_rt.models.quantize import FP8, hadamard, to_float8

_SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
_NO_PACKAGE = (ImportError, AttributeError, OSError, RuntimeError)
"""What importing a package's function raises that is missing, or was built for another torch."""

BACKENDS = ("auto", "sdpa", *_SDPA, *FLASH_ATTENTION)


def attend(q_BNHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor, backend: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(D)) v -> [B, N, H, D].

    ``sdpa`` lets torch choose its kernel. ``cudnn``, ``flash`` and ``math`` are torch's kernels of that name. ``fa2``
    to ``fa4`` are the FlashAttention packages. ``auto``: see ``resolve_backend``. With keys and values in fp8, ``fa3``
    computes in fp8 too, on a query in fp8 or not, and returns bfloat16; else the query's type is that of the product.
    """
    if backend == "auto":
        backend = resolve_backend(backend, q_BNHD.device, q_BNHD.dtype)
    if k_BMHD.dtype == FP8 and backend == "fa3":
        q_BNHD = q_BNHD if q_BNHD.dtype == FP8 else to_float8(q_BNHD)
    elif k_BMHD.dtype != q_BNHD.dtype:
        k_BMHD, v_BMHD = k_BMHD.to(q_BNHD.dtype), v_BMHD.to(q_BNHD.dtype)
    if backend in FLASH_ATTENTION:
        out = _flash_attention(backend)(q_BNHD, k_BMHD, v_BMHD)
        return out[0] if isinstance(out, tuple) else out  # some versions return the softmax's sums too
    q, k, v = (x.transpose(1, 2) for x in (q_BNHD, k_BMHD, v_BMHD))
    if backend in _SDPA:
        with sdpa_kernel(_SDPA[backend]):
            out = F.scaled_dot_product_attention(q, k, v)
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2)


def _flash_attention(backend: str) -> Callable[..., Any]:
    """A package's ``flash_attn_func``. Raises what importing the last of its modules raises."""
    *others, last = FLASH_ATTENTION[backend]
    for name in others:
        try:
            return importlib.import_module(name).flash_attn_func
        except _NO_PACKAGE:
            continue
    return importlib.import_module(last).flash_attn_func


class ProjectedChunk(Protocol):
    """q, k and v of a chunk's tokens, not written anywhere yet."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """N, H, D."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def write(
        self,
        q_NHD: Tensor,
        k_NHD: Tensor,
        v_NHD: Tensor,
        *,
        rows_N: Tensor | None = None,
        shifts_P: Tensor | None = None,
    ) -> None:
        """Writes them, rounded to the types of the tensors given. H may be two dimensions.

        ``rows_N``: the rows of ``k_NHD`` and ``v_NHD`` that take each token's; -1: none. ``shifts_P``: the tensors are
        for this rank's heads, and those of others are written that far away from them.
        """

    def store_rows(self, rows_N: Tensor, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor]) -> None:
        """Copies each token's keys and values [H, D] from the first tensor of a pair to its row in the second."""


class WindowAttention:
    """Self-attention of a chunk over its session's window.

    Sequence parallelism changes nothing else: ``parallel`` replaces ``CausalDiT.window_attention`` by a subclass that
    has only some of the tokens, and exchanges them for heads around the kernel.
    """

    uses_peer_memory = False
    can_be_captured = True
    """Whether a forward's exchanges, if any, may be part of a CUDA graph."""

    @property
    def layout(self) -> Hashable:
        """What a captured forward depends on in the memory for exchanges."""
        return None

    @contextmanager
    def recording(self) -> Iterator[Callable[[], None]]:
        """Exchanges inside are captured, not made. Yields what must be called at every replay."""
        yield lambda: None

    def missing_bytes(self, tokens: int, token_bytes: int) -> int:
        """Device memory for exchanges that a chunk would still take. ``token_bytes``: of q, k and v of one token."""
        return 0

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
        return attend(hadamard(q_BNHD) if cache.dtype == FP8 else q_BNHD, *cache.view(layer), backend)

    def store_projected(self, chunk: ProjectedChunk, cache: KVCache, layer: int) -> None:
        """``store`` without a copy: keys and values are written where they stay."""
        self._write_projected(chunk, cache, layer, cache.dtype)

    def attend_projected(self, chunk: ProjectedChunk, cache: KVCache, layer: int, backend: str) -> Tensor:
        """``__call__`` without copies: keys and values are written where they stay, q in the kernel's type."""
        fp8_kernel = cache.dtype == FP8 and backend == "fa3"
        q_NHD = self._write_projected(chunk, cache, layer, FP8 if fp8_kernel else chunk.dtype)
        return attend(q_NHD[None], *cache.view(layer), backend)

    def _write_projected(self, chunk: ProjectedChunk, cache: KVCache, layer: int, q_dtype: torch.dtype) -> Tensor:
        q_NHD = torch.empty(chunk.shape, dtype=q_dtype, device=chunk.device)
        k_BSHD, v_BSHD = cache.layer(layer)
        chunk.write(q_NHD, k_BSHD[0], v_BSHD[0], rows_N=cache.rows)
        return q_NHD


@lru_cache
def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """``auto`` in half precision is fa3 on Hopper if that package imports, else cudnn on Hopper and later; else sdpa.

    Any other name stays as it is. On an H100 FlashAttention 3 reaches 684 TFLOP/s, cuDNN 560 and torch's flash kernels
    about 300. All read B N H D storage directly.
    """
    if backend != "auto":
        return backend
    if dtype not in (torch.bfloat16, torch.float16) or device.type != "cuda":
        return "sdpa"
    capability = torch.cuda.get_device_capability(device)
    if capability < (9, 0):
        return "sdpa"
    return "fa3" if capability[0] == 9 and _imports("fa3") else "cudnn"


def missing_package(backend: str, device: torch.device) -> str:
    """What would make attention faster than ``backend`` on this device, and is not installed; empty if nothing."""
    if backend != "cudnn" or torch.cuda.get_device_capability(device)[0] != 9:
        return ""
    return "pip install fa3-fwd (FlashAttention 3) makes attention 1.2 times as fast on this GPU"


def _imports(backend: str) -> bool:
    try:
        _flash_attention(backend)
    except _NO_PACKAGE:
        return False
    return True


def text_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The kernel for attention to the text: one of torch's, as these compile together with the code around them."""
    backend = resolve_backend(backend, device, dtype)
    if backend not in FLASH_ATTENTION:
        return backend
    on_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return "cudnn" if on_hopper and dtype in (torch.bfloat16, torch.float16) else "sdpa"


def available_backends(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Each backend -> ``ok``, or the error of running it on a tiny input of ``dtype``."""
    found = {}
    x = torch.randn(1, 8, 2, 64, device=device, dtype=dtype)
    for backend in BACKENDS:
        try:
            attend(x, x, x, backend)
            found[backend] = "ok"
        except (*_NO_PACKAGE, ValueError, TypeError) as error:
            found[backend] = one_line(error)
    return found


def require_backend(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ConfigError, with the backends that run, when ``backend`` does not run on ``device`` in ``dtype``."""
    found = available_backends(device, dtype)
    if found[backend] != "ok":
        working = ", ".join(name for name, state in found.items() if state == "ok")
        raise ConfigError(
            f"--attention-backend {backend} does not run on {device.type} in {str(dtype).removeprefix('torch.')} "
            f"({found[backend]}); use one of: {working}",
            field="attention_backend",
        )
