"""What a conversion did, as numbers that add up; and back from the files that carry it."""

from dataclasses import asdict, dataclass, field
from typing import Any

from ..codec import Certificate, EncodeStats
from ..errors import BridgeError, short


@dataclass
class Report:
    """What a conversion did; reports of files add up.

    Attributes:
        tensors: weights written (scales not counted).
        bytes_written: size of the output.
        encoded: row key -> what encoding its tensors did to scales and values.
        recoded: row key -> certificate of its MXFP4 tensors recoded to FP8.
        rounded: row key -> float32 values rounded to bf16.
        lacking: weights of a draft that the checkpoint lacks and `like` gave.
    """

    tensors: int = 0
    bytes_written: int = 0
    encoded: dict[str, EncodeStats] = field(default_factory=dict)
    recoded: dict[str, Certificate] = field(default_factory=dict)
    rounded: dict[str, int] = field(default_factory=dict)
    lacking: int = 0

    def merge(self, other: "Report") -> None:
        """Add another report."""
        self.tensors += other.tensors
        self.bytes_written += other.bytes_written
        self.lacking += other.lacking
        for name in ("encoded", "recoded", "rounded"):
            mine, theirs = getattr(self, name), getattr(other, name)
            for key, value in theirs.items():
                mine[key] = mine[key] + value if key in mine else value

    def to_json(self) -> dict[str, Any]:
        """Plain types, for the journal and `--json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Report":
        """The inverse of `to_json`.

        Raises:
            BridgeError: it is none: a file of another process, or a damaged one.
        """
        try:
            return cls(
                _count(data["tensors"]),
                _count(data["bytes_written"]),
                {str(k): _stats(EncodeStats, v) for k, v in data["encoded"].items()},
                {str(k): _stats(Certificate, v) for k, v in data["recoded"].items()},
                {str(k): _count(v) for k, v in data["rounded"].items()},
                _count(data["lacking"]),
            )
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise BridgeError(f"reading what was converted: no report ({error})") from None


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{short(value)} as a count")
    return value


def _stats[T](kind: type[T], data: dict[str, Any]) -> T:
    """Figures of a dataclass, each of the type of its default."""
    found: dict[str, Any] = {}
    for name, default in vars(kind()).items():
        value = data[name]
        if isinstance(default, int):
            found[name] = _count(value)
        elif isinstance(default, float):
            if type(value) not in (int, float) or not value >= 0 or value > 1.8e308:
                raise ValueError(f"{name} is {short(value)}")
            found[name] = float(value)
        elif value is None and default is None:
            found[name] = None
        else:
            length = 2 if default is None else len(default)
            if not isinstance(value, list | tuple) or len(value) != length:
                raise ValueError(f"{name} is {short(value)}")
            found[name] = tuple(_count(one) for one in value)
    if unknown := data.keys() - found.keys():
        raise ValueError(f"{short(min(unknown))} is unknown")
    return kind(**found)
