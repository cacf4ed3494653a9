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
    """The text that `config` names, without a byte-order mark at its beginning."""
    try:
        return read_source(config).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 text (byte {error.start}); convert it, with iconv for instance"
        raise ConfigError(f"dataset.filepath={config.filepath}: {reason}") from error


def read_source(config: DatasetConfig) -> bytes:
    if config.filepath is not None:  # dataset.name=file
        return read_file(config.filepath)
    if config.name is DatasetName.tinyshakespeare:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chargpt"
        path = cache / "tinyshakespeare.txt"
        return download(TINYSHAKESPEARE_URL, TINYSHAKESPEARE_SHA256, path)
    missing = f"the bundled text is missing: {BUNDLED}; run from a clone of the repository"
    require(BUNDLED.is_file(), missing)
    return BUNDLED.read_bytes()


def read_file(filepath: str) -> bytes:
    name = f"dataset.filepath={filepath}"
    try:
        path = Path(filepath).expanduser()
        require(path.exists(), f"{name}: there is no such file")
        require(path.is_file(), f"{name}: is not a regular file")
        size = path.stat().st_size
        require(size > 0, f"{name}: is empty")
        limit = f"has {size:,} bytes; texts may have at most {MAX_BYTES:,}"
        require(size <= MAX_BYTES, f"{name}: {limit}")
        return path.read_bytes()
    except (OSError, RuntimeError) as error:  # RuntimeError: ~USER without a home folder
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{name}: cannot be read ({reason})") from error


def download(url: str, sha256: str, path: Path) -> bytes:
    """The file at `url`, downloaded once to `path`, verified by its hash."""
    if path.is_file():
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
        print(f"{path}: is damaged (wrong sha256), fetching it again", file=sys.stderr)
    data = fetch(url, path.name)
    found = hashlib.sha256(data).hexdigest()
    other = f"{url} sent another file (sha256 {found}, expected {sha256})"
    require(found == sha256, f"dataset.name=tinyshakespeare: {other}")
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = f"cannot be written ({error.strerror}); set XDG_CACHE_HOME to a writable folder"
        raise ConfigError(f"{path}: {reason}") from error
    return data


def fetch(url: str, name: str) -> bytes:
    """What the server sends, with a line that shows how much of `name` has arrived."""
    fetched = bytearray()
    too_long = f"{url}: more than {MAX_BYTES:,} bytes; that is not the text"
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            total = f" of {response.length:,}" if response.length else ""
            while block := response.read(1 << 16):
                fetched += block
                progress = f"\rdownloading {name}: {len(fetched):,}{total} bytes"
                print(progress, end="", file=sys.stderr)
                require(len(fetched) <= MAX_BYTES, too_long)
        print(file=sys.stderr)
    except (OSError, http.client.HTTPException) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        others = "dataset.name=shakespeare (bundled), or dataset.name=file dataset.filepath=PATH"
        problem = f"could not be downloaded ({reason}); write {others}"
        raise ConfigError(f"dataset.name=tinyshakespeare: {problem}") from error
    return bytes(fetched)
