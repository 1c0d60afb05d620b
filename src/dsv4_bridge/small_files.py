"""The small files beside the weights: tokenizer, generation config, chat encoding, licence."""

from pathlib import Path

NAMES = ("generation_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
STARTS = ("tokenizer", "vocab", "chat_template", "license", "notice", "readme", "third-party", "third_party")
FOLDERS = ("encoding", "inference")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".part")
_MAX_BYTES = 256 << 20


def small_files(folder: Path) -> dict[str, Path]:
    """Relative name -> path of the files of `folder` that a conversion carries over."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        name = path.name.lower()
        if path.is_file() and (name in NAMES or name.startswith(STARTS)) and _small(path):
            found[path.name] = path
        elif path.is_dir() and name in FOLDERS and not path.is_symlink():
            inner = (p for p in sorted(path.rglob("*")) if p.is_file() and "__pycache__" not in p.parts)
            found |= {str(p.relative_to(folder)): p for p in inner if _small(p)}
    return found


def _small(path: Path) -> bool:
    return not path.name.lower().endswith(WEIGHTS) and path.stat().st_size <= _MAX_BYTES
