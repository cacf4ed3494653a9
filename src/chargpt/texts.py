"""Where texts come from: the bundled corpus, tinyshakespeare downloaded once, any UTF-8 file."""

import contextlib
import hashlib
import http.client
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

from chargpt.config import DatasetConfig, DatasetName, shipped
from chargpt.errors import ConfigError, require

BUNDLED = shipped("data") / "shakespeare.txt"
TINYSHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
MAX_BYTES = 1 << 30


def read_text(config: DatasetConfig) -> str:
    """The text that `config` names, a byte-order mark at its beginning left out."""
    try:
        return read_source(config).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"dataset.filepath={config.filepath}: is not UTF-8 text (byte {error.start}); "
            "convert it, with iconv for instance"
        ) from error


def read_source(config: DatasetConfig) -> bytes:
    match config.name:
        case DatasetName.shakespeare:
            require(
                BUNDLED.is_file(),
                f"the bundled text is missing: {BUNDLED}; run from a clone of the repository",
            )
            return BUNDLED.read_bytes()
        case DatasetName.tinyshakespeare:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chargpt"
            return download(
                TINYSHAKESPEARE_URL, TINYSHAKESPEARE_SHA256, cache / "tinyshakespeare.txt"
            )
        case DatasetName.file:
            assert config.filepath is not None
            return read_file(config.filepath)


def read_file(filepath: str) -> bytes:
    name = f"dataset.filepath={filepath}"
    try:
        path = Path(filepath).expanduser()
        require(path.exists(), f"{name}: there is no such file")
        require(path.is_file(), f"{name}: is not a regular file")
        size = path.stat().st_size
        require(size > 0, f"{name}: is empty")
        require(
            size <= MAX_BYTES, f"{name}: has {size:,} bytes; texts of up to {MAX_BYTES:,} fit here"
        )
        return path.read_bytes()
    except (OSError, RuntimeError) as error:  # RuntimeError: a home folder of nobody
        raise ConfigError(
            f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from error


def download(url: str, sha256: str, path: Path) -> bytes:
    """The file at `url`, downloaded once to `path`, verified by its hash."""
    if path.is_file():
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
        print(f"{path}: is damaged (wrong sha256), fetching it again", file=sys.stderr)
    fetched = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            total = f" of {response.length:,}" if response.length else ""
            while block := response.read(1 << 16):
                fetched += block
                print(
                    f"\rdownloading {path.name}: {len(fetched):,}{total} bytes",
                    end="",
                    file=sys.stderr,
                )
                require(
                    len(fetched) <= MAX_BYTES,
                    f"{url}: more than {MAX_BYTES:,} bytes; that is not the text",
                )
        print(file=sys.stderr)
    except (OSError, http.client.HTTPException) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise ConfigError(
            f"dataset.name=tinyshakespeare: could not be downloaded ({reason}); "
            "write dataset.name=shakespeare (bundled), or dataset.name=file dataset.filepath=PATH"
        ) from error
    found = hashlib.sha256(fetched).hexdigest()
    require(
        found == sha256,
        f"dataset.name=tinyshakespeare: {url} sent another file "
        f"(sha256 {found}, expected {sha256})",
    )
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(fetched)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror}); set XDG_CACHE_HOME to a folder that can"
        ) from error
    return bytes(fetched)
