"""The attention backend: what vLLM 0.32 asks for, on pages of constant size.

To vLLM a layer is a ring of one block per request, ``CircularBufferSpec``: its manager gives each
request one block for its whole life, caches no prefix of it and maps no slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
import vllm
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import CircularBufferSpec, FullAttentionSpec

from less.cache import PagedLayer
from less.integrations.vllm import check_version
from less.integrations.vllm.scheduler import choose
from less.integrations.vllm.settings import Settings
from less.integrations.vllm.shape import facts_of, layers_of, request_cache
from less.integrations.vllm.steps import Step, Steps, look
from less.layer import Paged, PageRows

check_version(vllm.__version__)


class Engine:
    """What the layers of one engine share in this process: settings, layers, steps.

    Args:
        config: vLLM's.

    Raises:
        ValueError: A setting is wrong, or model and settings do not go together.
    """

    _current: ClassVar[tuple[VllmConfig, Engine] | None] = None

    def __init__(self, config: VllmConfig) -> None:
        self.settings = Settings.of(config)
        model, device = config.model_config, torch.device(config.device_config.device)
        part = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self.facts = facts_of(model.hf_config, model.dtype, device, part)
        self.longest = int(model.max_model_len)
        cache = request_cache(self.facts, self.settings)
        if part[0] == 0:  # one process of them speaks
            cache.limits.expect(self.longest)
        self.biased = cache.biased
        self.layers = layers_of(self.facts, cache)
        self.requests = int(config.scheduler_config.max_num_seqs)
        self.steps = Steps(self.requests, self.settings.chunk, device)

    @classmethod
    def of(cls, config: VllmConfig) -> Engine:
        """The engine of a config; one is remembered."""
        if cls._current is None or cls._current[0] is not config:
            cls._current = (config, cls(config))
        return cls._current[1]


@dataclass(frozen=True, kw_only=True)
class LessSpec(CircularBufferSpec):  # type: ignore[misc]
    """A page per request and layer; layers may differ in its size."""

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of a request: a page.

        The process that schedules asks for them before it makes its scheduler, and nothing else of
        this backend runs there. So the scheduler is chosen here.

        Raises:
            ValueError: ``scheduler_cls`` names one that computes running requests anew.
        """
        choose(vllm_config.scheduler_config)
        return int(super().max_memory_usage_bytes(vllm_config))


class LessBackend(AttentionBackend):  # type: ignore[misc]
    """``--attention-backend CUSTOM``. Every layer gets a subclass that knows its page."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]
    forward_includes_kv_cache_update = True
    page: ClassVar[int | None] = None  # bytes
    longest: ClassVar[int] = 0  # tokens of a text

    @staticmethod
    def get_name() -> str:
        """The name that vLLM keeps for plug-ins."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[LessImpl]:
        """What computes."""
        return LessImpl

    @staticmethod
    def get_builder_cls() -> type[LessBuilder]:
        """What reads a batch."""
        return LessBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        """A state per request: block sizes are not negotiated."""
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """No."""
        return False

    @classmethod
    def customize_spec(cls, spec: Any) -> LessSpec:
        """One block per request, of the layer's page.

        Raises:
            RuntimeError: The layer is not built yet.
            ValueError: The layer is of a kind that is not bounded.
        """
        if not isinstance(spec, FullAttentionSpec):
            raise ValueError(f"less: a layer of {type(spec).__name__} cannot be bounded")
        if cls.page is None:
            raise RuntimeError("less: vLLM asked for the page of a layer before it was built")
        return LessSpec(
            block_size=cls.longest,  # position // block_size, a slot's block, is always 0
            tokens_per_state=cls.longest,
            num_kv_heads=spec.num_kv_heads,
            num_head_slots=1,
            head_size=spec.head_size,
            dtype=torch.int8,
            state_content_bytes=cls.page,
            dcp_sharded=False,
        )


@cache
def backend_of(page: int, longest: int) -> type[LessBackend]:
    """The backend of layers with pages of so many bytes, for texts of so many tokens."""
    names = {
        "page": page,
        "longest": longest,
        "__module__": LessBackend.__module__,
        "__qualname__": LessBackend.__qualname__,
    }
    return type(LessBackend.__name__, (LessBackend,), names)


class LessBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
    """Makes a ``Step`` of a batch. A batch in which all decode can be captured in a CUDA graph."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold = 1

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.engine = Engine.of(vllm_config)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Step:
        """The step of a batch."""
        return self.engine.steps.of(common_attn_metadata)


class LessImpl(AttentionImpl[AttentionMetadata]):  # type: ignore[misc]
    """One layer. Arguments are vLLM's; what a bounded cache cannot do is refused by name."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        check_layer(
            alibi_slopes=alibi_slopes,
            sliding_window=sliding_window,
            attn_type=None if attn_type == AttentionType.DECODER else attn_type,
            kv_sharing_target_layer_name=kv_sharing_target_layer_name,
            **others,
        )
        self.config = get_current_vllm_config()
        self.engine = Engine.of(self.config)
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.softcap = logits_soft_cap or None
        self.layer: PagedLayer | None = None
        self.pool: Tensor | None = None
        self.looked = False  # at its keys

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Find the layer that this is, and tell it its page: now that all layers have names.

        Raises:
            RuntimeError: vLLM knows no layer of this.
            ValueError: vLLM's layer differs from the model's.
        """
        known = self.config.compilation_config.static_forward_context
        mine = [x for x in known.values() if getattr(x, "impl", None) is self]
        if len(mine) != 1:
            raise RuntimeError(f"less: vLLM has {len(mine)} layers with this attention, not one")
        index = extract_layer_index(mine[0].layer_name)
        facts, layers = self.engine.facts, self.engine.layers
        layer = layers[index] if index < len(layers) else None
        for name, wanted, got in (
            ("number of query heads", facts.q_heads, self.num_heads),
            ("number of kv heads", facts.kv_heads, self.num_kv_heads),
            ("head dim", facts.head_dim, self.head_size),
            ("factor of q.k", round(facts.scale, 9), round(self.scale, 9)),
            ("soft-cap", facts.softcap, self.softcap),
        ):
            if wanted != got:
                raise ValueError(
                    f"less: the {name} of {mine[0].layer_name} must be {wanted}, as transformers' "
                    f"model has it, got {got} from vLLM"
                )
        if layer is None:
            raise ValueError(f"less: {mine[0].layer_name} is no layer that {facts.name} has")
        self.layer = layer
        mine[0].attn_backend = backend_of(layer.layout.nbytes, self.engine.longest)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Step | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend with a step's tokens, which join their pages.

        Args:
            layer: vLLM's.
            query: [tokens, Q, D], the tokens that pad a batch included.
            key: [tokens, K, D].
            value: [tokens, K, D].
            kv_cache: int8 [N, 1, 1, page].
            attn_metadata: The step; None in a run that measures memory.
            output: [tokens, Q, D]. Written.
            output_scale: Must be None.
            output_block_scale: Must be None.
        """
        if output_scale is not None or output_block_scale is not None:
            raise ValueError("less: output_scale must be None; fused quantization is not offered")
        if attn_metadata is None:
            return output.fill_(0)
        assert self.layer is not None
        if self.pool is None or self.pool.data_ptr() != kv_cache.data_ptr():
            self._bind(kv_cache)
        assert self.pool is not None
        if not self.looked:
            self.looked = look(self.engine.biased, attn_metadata, key)
        return attn_metadata.attend(self.layer, self.pool, query, key, value, output)

    def _bind(self, kv_cache: Tensor) -> None:
        assert self.layer is not None
        self.pool = self.layer.layout.check_pool("less", kv_cache)
        rows = torch.full((1, self.engine.requests), -1, dtype=torch.int32)
        at = Paged(self.pool, PageRows.of(rows.to(kv_cache.device)))
        self.layer.backend.reserve(self.layer.plan, at, self.engine.requests)


def check_layer(**settings: Any) -> None:
    """Refuse a layer that is more than causal attention over all tokens.

    Args:
        **settings: What vLLM passes for it; None: not asked for.

    Raises:
        ValueError: Something is asked for.
    """
    asked = sorted(name for name, value in settings.items() if value is not None)
    if "sliding_window" in asked:
        raise ValueError(
            "less: a layer that slides bounds itself, and stays vLLM's own: on a GPU ask with "
            '--attention-config \'{"backend_per_kind": {"full_attention": "CUSTOM"}}\'; on a CPU '
            "vLLM has no such choice"
        )
    if asked:
        raise ValueError(
            f"less: a layer with {', '.join(asked)} is not served: a bounded cache computes plain "
            "causal attention"
        )
