"""The usual 5 x 7 pixel font of small displays: enough for captions on contact sheets, with no font file and no drawing library."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Five columns a character, the lowest bit at the top; eight rows, the last for descenders.
_COLUMNS = {
    " ": "0000000000", "!": "00005f0000", "'": "0008070300", "(": "001c224100", ")": "0041221c00", "+": "08083e0808",
    ",": "0080703000", "-": "0808080808", ".": "0000606000", "/": "2010080402", ":": "0000140000", "?": "0201590906",
    "0": "3e5149453e", "1": "00427f4000", "2": "7249494946", "3": "2141494d33", "4": "1814127f10", "5": "2745454539",
    "6": "3c4a494931", "7": "4121110907", "8": "3649494936", "9": "464949291e", "a": "2054547840", "b": "7f28444438",
    "c": "3844444428", "d": "384444287f", "e": "3854545418", "f": "00087e0902", "g": "18a4a49c78", "h": "7f08040478",
    "i": "00447d4000", "j": "2040403d00", "k": "7f10284400", "l": "00417f4000", "m": "7c04780478", "n": "7c08040478",
    "o": "3844444438", "p": "fc18242418", "q": "18242418fc", "r": "7c08040408", "s": "4854545424", "t": "04043f4424",
    "u": "3c4040207c", "v": "1c2040201c", "w": "3c4030403c", "x": "4428102844", "y": "4c9090907c", "z": "4464544c44",
}  # fmt: skip


def text_image(text: str, width: int) -> Tensor:
    """Black on white, uint8 (8, width, 3), cut off at the width. Capitals come out small, characters the font lacks as question marks."""
    columns = []
    for character in text.lower():
        for column in bytes.fromhex(_COLUMNS.get(character, _COLUMNS["?"])):
            columns.append([column >> row & 1 for row in range(8)])
        columns.append([0] * 8)
    ink = torch.tensor(columns or [[0] * 8], dtype=torch.uint8)[:width].T
    ink = F.pad(ink, (0, width - ink.shape[1]))
    return (255 - 255 * ink)[..., None].expand(-1, -1, 3)
