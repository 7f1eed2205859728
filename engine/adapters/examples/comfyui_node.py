"""A node of ComfyUI that lets a model use tubelet's attention. Copy this file into ComfyUI's `custom_nodes`."""

from tubelet.engine.adapters import comfy_attention


class TubeletAttention:
    """MODEL -> MODEL; the model that comes in is left as it is."""

    CATEGORY = "model_patches"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"model": ("MODEL",), "enabled": ("BOOLEAN", {"default": True})}}

    def patch(self, model, enabled: bool) -> tuple:
        model = model.clone()
        if enabled:
            model.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = comfy_attention
        return (model,)


NODE_CLASS_MAPPINGS = {"TubeletAttention": TubeletAttention}
NODE_DISPLAY_NAME_MAPPINGS = {"TubeletAttention": "tubelet attention"}
