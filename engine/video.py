"""Clips, and reading and writing them through PyAV: MP4 (H.264), GIF, PNG, NumPy. Files are encoded in memory and then written whole
or not at all.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .font import text_image
from .pretrained import check_parent, write_whole

FORMATS = (".mp4", ".gif", ".png", ".npy")


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames, uint8 (T, H, W, 3) RGB on the CPU, at `fps` frames per second. `clip[-8:]` is a Clip, `clip[0]` an image; `a + b` plays
    one after the other.
    """

    frames: Tensor
    fps: float = 8.0
    prompt: str | None = None
    seed: int | None = None

    def __post_init__(self):
        if not isinstance(self.frames, Tensor) or self.frames.dtype != torch.uint8:
            what = self.frames.dtype if isinstance(self.frames, Tensor) else type(self.frames).__name__
            raise TypeError(f"frames: expected a uint8 tensor, got {what}")
        if self.frames.dim() != 4 or self.frames.shape[-1] != 3 or 0 in self.frames.shape:
            raise ValueError(f"frames: expected (T, H, W, 3) with none of them 0, got {tuple(self.frames.shape)}")
        if not 0 < self.fps < float("inf"):
            raise ValueError(f"fps: expected a number above 0, got {self.fps}")

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int | slice) -> "Clip | Tensor":
        if isinstance(index, slice):
            return Clip(self.frames[index], self.fps, self.prompt, self.seed)
        return self.frames[index]

    def __add__(self, other: "Clip") -> "Clip":
        if self.frames.shape[1:] != other.frames.shape[1:] or self.fps != other.fps:
            raise ValueError(
                f"other: expected a clip of {self.width}x{self.height} at {self.fps} frames per second, got "
                f"{other.width}x{other.height} at {other.fps}"
            )
        return Clip(torch.cat((self.frames, other.frames)), self.fps, self.prompt, self.seed)

    @property
    def height(self) -> int:
        return self.frames.shape[1]

    @property
    def width(self) -> int:
        return self.frames.shape[2]

    @property
    def duration(self) -> float:
        """Seconds."""
        return len(self) / self.fps

    def numpy(self) -> np.ndarray:
        return self.frames.numpy()

    @classmethod
    def from_float(cls, video: Tensor, fps: float = 8.0) -> "Clip":
        """From (3, T, H, W) in [-1, 1]; what lies outside is clamped."""
        frames = ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return cls(frames.permute(1, 2, 3, 0).contiguous().cpu(), fps)

    def to_float(self) -> Tensor:
        """float32 (3, T, H, W) in [-1, 1]."""
        return to_float(self.frames)

    @classmethod
    def load(cls, path: str | Path) -> "Clip":
        """Read a video, GIF or image file, or a folder of PNG frames. Raises FileNotFoundError, or ValueError for what cannot be
        decoded.
        """
        path = Path(path)
        if path.is_dir():
            images = sorted(path.glob("*.png"))
            if not images:
                raise ValueError(f"{path}: a folder without PNG frames")
            parts = [_decode(image)[0][0] for image in images]
            if len({part.shape for part in parts}) > 1:
                raise ValueError(f"{path}: PNG frames of different sizes")
            return cls(torch.from_numpy(np.stack(parts)))
        if path.suffix == ".npy" and path.is_file():
            try:
                return cls(torch.from_numpy(np.load(path, allow_pickle=False)))
            except (ValueError, TypeError, EOFError) as error:
                raise ValueError(f"{path}: not the frames of a clip: {error or 'the file is empty'}") from error
        frames, fps = _decode(path)
        return cls(torch.from_numpy(np.stack(frames)), fps)

    def save(self, path: str | Path) -> None:
        """Write to PATH.mp4, .gif, .npy, .png (a contact sheet if there is more than one frame), or, for a folder or a path without a
        suffix, numbered PNG frames.

        Raises ValueError for another suffix, FileNotFoundError for a missing parent folder, OSError (naming the path) if writing
        fails; then nothing is changed.
        """
        path = Path(path)
        if path.is_dir() or not path.suffix:
            self.save_frames(path)
        elif path.suffix.lower() not in FORMATS:
            raise ValueError(f"{path}: expected a name that ends in {', '.join(FORMATS)}, or a folder")
        elif path.suffix.lower() == ".mp4":
            write_whole(path, self._mp4())
        elif path.suffix.lower() == ".gif":
            write_whole(path, self._gif())
        elif path.suffix.lower() == ".npy":
            buffer = io.BytesIO()
            np.save(buffer, self.numpy())
            write_whole(path, buffer.getvalue())
        else:
            write_whole(path, encode_png(self.frames[0] if len(self) == 1 else contact_sheet([self])))

    def save_frames(self, folder: str | Path) -> None:
        """Write numbered PNG frames to a folder, which is made if it is missing: all of them, or none."""
        folder = Path(folder)
        images = [encode_png(frame) for frame in self.frames]
        check_parent(folder)
        made = not folder.exists()
        folder.mkdir(exist_ok=True)
        written = []
        try:
            for i, image in enumerate(images):
                name = folder / f"{i:05d}.png"
                existed = name.exists()
                write_whole(name, image)
                if not existed:
                    written.append(name)
        except OSError:
            for name in written:
                name.unlink(missing_ok=True)
            if made:
                folder.rmdir()
            raise

    def _mp4(self) -> bytes:
        # 4:2:0 needs even sides; without it colours are kept at full resolution, which some players refuse.
        even = self.height % 2 == 0 and self.width % 2 == 0
        options = {"crf": "14", "preset": "medium"}
        return _encode(self.frames.numpy(), self.fps, "mp4", "libx264", "yuv420p" if even else "yuv444p", options)

    def _gif(self) -> bytes:
        import av
        from av.filter import Graph

        graph = Graph()
        rate = _rate(self.fps)
        source = graph.add_buffer(width=self.width, height=self.height, format="rgb24", time_base=1 / rate)
        split, generate, use, sink = (graph.add(name) for name in ("split", "palettegen", "paletteuse", "buffersink"))
        source.link_to(split)
        split.link_to(generate, 1, 0)
        split.link_to(use, 0, 0)
        generate.link_to(use, 0, 1)
        use.link_to(sink)
        graph.configure()
        for i, image in enumerate(self.frames.numpy()):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = i, 1 / rate
            source.push(frame)
        source.push(None)
        frames = []
        while len(frames) < len(self):
            frames.append(sink.pull())
        return _encode(frames, self.fps, "gif", "gif", "pal8", {"loop": "0"})


def to_float(frames: Tensor) -> Tensor:
    """uint8 (T, H, W, 3) to float32 (3, T, H, W) in [-1, 1]."""
    return frames.permute(3, 0, 1, 2).float() / 127.5 - 1


def fit(frames: Tensor, height: int, width: int) -> Tensor:
    """uint8 (T, H, W, 3), scaled so that it covers (height, width) and cropped in the middle."""
    if frames.shape[1:3] == (height, width):
        return frames
    scale = max(height / frames.shape[1], width / frames.shape[2])
    size = (max(round(frames.shape[1] * scale), height), max(round(frames.shape[2] * scale), width))
    scaled = F.interpolate(frames.permute(0, 3, 1, 2).float(), size, mode="bilinear", antialias=True, align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    crop = scaled[:, :, top : top + height, left : left + width]
    return crop.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()


def load_image(path: str | Path) -> Tensor:
    """The first frame of an image or video file, uint8 (H, W, 3)."""
    return torch.from_numpy(_decode(Path(path), most=1)[0][0])


def save_png(image: Tensor, path: str | Path) -> None:
    """Write an image, uint8 (H, W, 3)."""
    write_whole(Path(path), encode_png(image))


def contact_sheet(clips: Sequence[Clip], captions: Sequence[str] | None = None, *, columns: int = 8, scale: int = 2) -> Tensor:
    """One row of evenly spaced frames a clip, under its caption: uint8 (H, W, 3)."""
    if captions is not None and len(captions) != len(clips):
        raise ValueError(f"captions: expected one for each of {len(clips)} clips, got {len(captions)}")
    rows = []
    for i, clip in enumerate(clips):
        picked = torch.linspace(0, len(clip) - 1, min(columns, len(clip))).round().long()
        frames = clip.frames[picked].repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
        row = torch.cat([F.pad(frame, (0, 0, 0, 4, 0, 4), value=255) for frame in frames], dim=1)
        if captions is not None:
            row = torch.cat((F.pad(text_image(captions[i], row.shape[1]), (0, 0, 0, 0, 4, 2), value=255), row))
        rows.append(row)
    width = max(row.shape[1] for row in rows)
    return torch.cat([F.pad(row, (0, 0, 0, width - row.shape[1]), value=255) for row in rows])


def encode_png(image: Tensor) -> bytes:
    return _encode(image.numpy()[None], 1, "image2pipe", "png", "rgb24", {})


def _rate(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(1001)


def _encode(frames, fps: float, container: str, codec: str, pixels: str, options: dict[str, str]) -> bytes:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=_rate(fps), options=options)
        first = frames[0]
        stream.height, stream.width = (first.height, first.width) if hasattr(first, "height") else first.shape[:2]
        stream.pix_fmt = pixels
        for i, image in enumerate(frames):
            frame = image if hasattr(image, "height") else av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = i, 1 / _rate(fps)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return buffer.getvalue()


def _decode(path: Path, most: int | None = None) -> tuple[list[np.ndarray], float]:
    """Frames (H, W, 3) and frames per second. A file that ends early is an error, not a short clip."""
    import av

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    frames = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path}: holds no video")
            stream = container.streams.video[0]
            stream.codec_context.options = {"err_detect": "explode"}
            fps = float(stream.average_rate or 8)
            for frame in container.decode(stream):
                turns = round(getattr(frame, "rotation", 0) / 90)  # counterclockwise: how the camera was held
                frames.append(np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns)))
                if most is not None and len(frames) == most:
                    break
            expected = stream.frames
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(f"{path}: cannot be decoded as video: {error}") from error
    if not frames or (most is None and len(frames) < expected):
        raise ValueError(f"{path}: cannot be decoded as video: {len(frames)} frames of {expected or 'an unknown number'} can be read")
    return frames, fps
