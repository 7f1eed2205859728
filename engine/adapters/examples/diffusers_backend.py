"""tubelet as a back end of diffusers' attention dispatcher: attention alone, for any model that goes through it.

python diffusers_backend.py
"""

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.attention_dispatch import attention_backend
from tubelet.engine.adapters import register_diffusers_backend, use_diffusers_backend
from tubelet.kernels import engaged, reset_engaged


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=64, num_attention_heads=4,
        joint_attention_dim=64, axes_dims_rope=(16, 24, 24),
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 256, 16),
        "encoder_hidden_states": torch.randn(1, 20, 64),
        "encoder_hidden_states_mask": torch.ones(1, 20, dtype=torch.int64),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [(1, 16, 16)],
    }
    before = model(**inputs).sample

    name = register_diffusers_backend()
    with attention_backend(name):  # all models, in this block
        inside = model(**inputs).sample
    print(f"in a block: relative error {float((inside - before).norm() / before.norm()):.1e}, {engaged()['attention']}")

    reset_engaged()
    print("this model, from now on:", use_diffusers_backend(model))
    after = model(**inputs).sample
    print(f"relative error {float((after - before).norm() / before.norm()):.1e}, {engaged()['attention']}")


if __name__ == "__main__":
    main()
