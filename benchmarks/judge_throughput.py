"""Throughput of ``fedrx judge`` with 32 calls in flight against a server of fixed latency.

The server is its own process and answers each call after LATENCY_SECONDS, so that no client can
pass concurrency / latency calls per second. Goal: at least 0.9 of that. Prints one JSON object.

    python benchmarks/judge_throughput.py
"""

import asyncio
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from common.config import Config, JudgeConfig
from common.evaluation.judge.judging import judge_run
from common.evaluation.judge.questions import questions_of
from common.rundir import RunDirectory

CONCURRENCY = 32
LATENCY_SECONDS = 1.0
LISTS = 32 * 20
DRUGS = 28
GOAL = 0.9

REPLY = json.dumps(
    {"drugs": [{"drug": f"Drug {n}", "suitable": True, "reason": "usual"} for n in range(DRUGS)]}
)
DOCUMENT = json.dumps(
    {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "fixed",
        "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "a", "content": REPLY}}
        ],
        "usage": {"prompt_tokens": 700, "completion_tokens": 600},
    }
).encode()


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one connection's requests, each LATENCY_SECONDS after it has come in."""
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(DOCUMENT)}"
    try:
        while True:
            request = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(request.split("content-length:")[1].split("\r\n")[0])
            await reader.readexactly(length)
            await asyncio.sleep(LATENCY_SECONDS)
            writer.write(head.encode() + b"\r\n\r\n" + DOCUMENT)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


def serve(ready: Connection) -> None:
    """Run the server; its port goes to ``ready``."""

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=256)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def with_server(work: Callable[[int], float]) -> float:
    """Call ``work(port)`` beside the server."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(there,), daemon=True)
    process.start()
    try:
        return work(here.recv())
    finally:
        process.terminate()
        process.join()


def judge_seconds(port: int, folder: Path) -> float:
    """Judge LISTS lists and return the wall time, everything included but imports."""
    run = RunDirectory.create(Config(), directory=folder / "run")
    for number in range(LISTS):
        line = {
            "case": f"case-{number}",
            "cluster": number,
            "model": "fedrx",
            "patient": {"sex": "F", "age": str(20 + number % 60)},
            "diagnoses": [f"Diagnosis {number} {n}" for n in range(15)],
            "truth": [],
            "answer": [f"Drug {n}" for n in range(DRUGS)],
        }
        run.append("predictions.jsonl", line)
    run.write_json("summary.json", {"source": "synthetic"})
    config = JudgeConfig(
        base_url=f"http://127.0.0.1:{port}/v1", model="fixed", concurrency=CONCURRENCY
    )
    questions = questions_of(run, config)
    started = time.perf_counter()
    result = judge_run(run, questions)
    seconds = time.perf_counter() - started
    if result.judgements.scored != LISTS:
        raise SystemExit("not every list was scored")
    return seconds


def main() -> None:
    """Measure once and print the figures."""
    import openai

    cpu_started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        seconds = with_server(lambda port: judge_seconds(port, Path(folder)))
    reached, possible = LISTS / seconds, CONCURRENCY / LATENCY_SECONDS
    print(
        json.dumps(
            {
                "calls": LISTS,
                "concurrency": CONCURRENCY,
                "latency_seconds": LATENCY_SECONDS,
                "seconds": round(seconds, 3),
                "calls_per_second": round(reached, 2),
                "possible_calls_per_second": possible,
                "share": round(reached / possible, 4),
                "goal": GOAL,
                "met": reached / possible >= GOAL,
                "cpu_seconds": round(time.process_time() - cpu_started, 3),
                "load_average": os.getloadavg()[0],
                "openai": openai.__version__,
                "python": platform.python_version(),
                "cpus": os.cpu_count(),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
