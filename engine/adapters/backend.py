"""tubelet as a back end of diffusers' attention dispatcher, for models whose processors go through it."""

from torch import Tensor, nn

from .functions import masked_attention

NAME = "tubelet"


def register_diffusers_backend() -> str:
    """Make "tubelet" a back end of `diffusers.models.attention_dispatch`, which the default is not changed to; returns its name. Once is
    enough, more does nothing.

    `use_diffusers_backend(model)` then lets one model use it, and `with attention_backend("tubelet")` all in a block. The library's own
    `model.set_attention_backend("tubelet")` also makes it the default of the process.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    if NAME not in AttentionBackendName._value2member_map_:
        member = str.__new__(AttentionBackendName, NAME)
        member._name_, member._value_ = NAME.upper(), NAME
        member.__objclass__, member._sort_order_ = AttentionBackendName, len(AttentionBackendName._member_names_)
        AttentionBackendName._member_map_[member._name_] = AttentionBackendName._value2member_map_[NAME] = member
        AttentionBackendName._member_names_.append(member._name_)
    _AttentionBackendRegistry.register(AttentionBackendName(NAME))(_attention)
    return NAME


def use_diffusers_backend(model: nn.Module) -> list[str]:
    """Let those attention modules of a model that go through the dispatcher use "tubelet", and no other model: their names."""
    register_diffusers_backend()
    found = [name for name, module in model.named_modules() if hasattr(getattr(module, "processor", None), "_attention_backend")]
    for name in found:
        model.get_submodule(name).processor._attention_backend = NAME
    return found


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config=None,
) -> Tensor:
    """query, key, value: (batch, tokens, heads, head_dim)."""
    if dropout_p or return_lse or _parallel_config is not None:
        wrong = "dropout_p" if dropout_p else "return_lse" if return_lse else "_parallel_config"
        raise ValueError(f"{wrong}: expected none, which the back end {NAME!r} does not know")
    return masked_attention(query, key, value, attn_mask, is_causal, scale)
