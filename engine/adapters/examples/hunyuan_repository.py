"""HunyuanVideo's own repository (github.com/Tencent-Hunyuan/HunyuanVideo) on tubelet's attention. Run it there instead of
sample_video.py:

    python hunyuan_repository.py --video-size 544 960 --video-length 129 --prompt "a cat walks on grass" --save-path ./results
"""

import runpy

from tubelet.engine.adapters import hunyuan_attention
from tubelet.kernels import engaged


def main() -> None:
    import hyvideo.modules.attenion  # their spelling
    import hyvideo.modules.models
    import hyvideo.modules.token_refiner

    for module in (hyvideo.modules.attenion, hyvideo.modules.models, hyvideo.modules.token_refiner):
        module.attention = hunyuan_attention
    runpy.run_path("sample_video.py", run_name="__main__")
    print(engaged()["attention"])


if __name__ == "__main__":
    main()
