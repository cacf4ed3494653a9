"""How long readers of `chargpt play` wait for the first character, and how fast texts are written.

    python benchmarks/play.py multirun/2026-01-01/12-00-00
    python benchmarks/play.py multirun/2026-01-01/12-00-00 streams=1,50 length=200 rounds=5

The program is started on a free port; readers are connections on the loopback interface, all of
one process, which shares the cores with it. In each round every model has its turn with each number
of streams, all of which begin at once; two rounds before the first compile. Shown are the median
over all streams of all rounds (the slowest in brackets), and the best round's characters per
second, all streams together. Memory is the resident set of the program after each round.
"""

import asyncio
import json
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from arguments import read
from common import machine

COMPILING = 2  # rounds: the program also compiles sizes of its batches while it is idle
PROMPT = "HAMLET:\nTo be, or not to be"


async def follow(port: int, model: int, seed: int, length: int) -> tuple[float, int]:
    """(seconds to the first character, number of characters) of one stream."""
    asked = {"models": [model], "prompt": PROMPT, "length": length, "seed": seed}
    body = json.dumps(asked).encode()
    head = f"POST /continue HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    began, first, made, event = time.perf_counter(), None, 0, b""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    writer.write(head.encode() + body)
    async for line in reader:
        if line.startswith(b"event: "):
            event = line[7:].strip()
        elif line.startswith(b"data: ") and event == b"text":
            first = first or time.perf_counter() - began
            made = json.loads(line[6:])["made"]
    writer.close()
    assert first is not None and made == length, f"model {model}, seed {seed}: {made} characters"
    return first, made


async def measure(port: int, model: int, streams: int, length: int) -> tuple[list[float], float]:
    """(seconds to the first character of each stream, characters per second of all)."""
    began = time.perf_counter()
    found = await asyncio.gather(*(follow(port, model, seed, length) for seed in range(streams)))
    seconds = time.perf_counter() - began
    return [first for first, _ in found], sum(made for _, made in found) / seconds


def memory(pid: int) -> float:
    """Resident set in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1000


def main(arguments: list[str]) -> None:
    chosen, runs = read(arguments, streams="1,10,50", length=200, rounds=3)
    counts = [int(number) for number in chosen["streams"].split(",")]
    bounds = [f"{name}={max(counts)}" for name in ("streams", "streams_per_client")]
    command = [sys.executable, "-m", "chargpt", "play", *runs, "port=0", *bounds]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        port = int(program.stdout.readline().rstrip("/\n").rpartition(":")[2])
        try:
            show(port, program.pid, counts, chosen["length"], chosen["rounds"])
        finally:
            program.terminate()


def show(port: int, pid: int, counts: list[int], length: int, rounds: int) -> None:
    overview = json.loads(get(port, "/models"))
    names = {model["id"]: model["name"] for model in overview["models"]}
    waits: dict[tuple[int, int], list[float]] = {}
    speeds: dict[tuple[int, int], list[float]] = {}
    sizes = []
    for number in range(-COMPILING, rounds):
        for count in counts:
            for model in names:
                firsts, speed = asyncio.run(measure(port, model, count, length))
                if number >= 0:
                    waits.setdefault((model, count), []).extend(firsts)
                    speeds.setdefault((model, count), []).append(speed)
        sizes.append(memory(pid))
    print(f"{machine()}; {length} characters, {rounds} rounds")
    head = "".join(f" first character, {n}, ms | characters/s, {n} |" for n in counts)
    print(f"| model |{head}\n|---|" + 2 * len(counts) * "---|")
    for model, name in names.items():
        cells = [
            f"{1000 * statistics.median(waits[model, n]):.0f}"
            f" ({1000 * max(waits[model, n]):.0f}) | {max(speeds[model, n]):,.0f}"
            for n in counts
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    print("memory after each round, MB: " + ", ".join(f"{size:,.0f}" for size in sizes))


def get(port: int, path: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
        return answer.read()


if __name__ == "__main__":
    main(sys.argv[1:])
