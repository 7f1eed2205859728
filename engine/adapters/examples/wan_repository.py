"""Wan's own repository (github.com/Wan-Video/Wan2.1, Wan2.2) on tubelet's attention. Run it there instead of generate.py:

python wan_repository.py --task t2v-1.3B --size 832*480 --ckpt_dir ./Wan2.1-T2V-1.3B --prompt "a cat walks on grass"
"""

import runpy

from tubelet.engine.adapters import flash_attention
from tubelet.kernels import engaged


def main() -> None:
    import wan.modules.attention
    import wan.modules.model

    # Where it is defined, for what imports it from now on, and where it is used.
    wan.modules.attention.flash_attention = wan.modules.model.flash_attention = flash_attention
    runpy.run_path("generate.py", run_name="__main__")
    print(engaged()["attention"])


if __name__ == "__main__":
    main()
