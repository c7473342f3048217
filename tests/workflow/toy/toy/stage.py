"""Stages that compute nothing of interest in no time, and write down that they ran."""

import importlib
import json
import os
import sys
import time
import zlib
from pathlib import Path

import yaml

METRICS = Path("results/metrics")


def folder(path, content):
    """Write a folder of two files."""
    path = Path(path)
    path.mkdir(parents=True)
    (path / "content.txt").write_text(content, encoding="utf-8")
    (path / "provenance.json").write_text(json.dumps({"length": len(content)}), encoding="utf-8")


def text(path):
    """Read what `folder` wrote."""
    return (Path(path) / "content.txt").read_text(encoding="utf-8")


def main(group, key, params):
    """Make the outputs of one stage."""
    if group == "fetch":
        folder(f"data/models/{key}", f"model {params['models'][key]}")
    elif group == "train":
        item = params["trained"][key]
        folder(
            f"data/models/{key}", f"{item} {params['seed']} {text('data/models/' + item['base'])}"
        )
    elif group == "calibrate":
        folder(f"data/calibration/{key}", f"{params['seed']} {text('data/models/' + key)}")
    elif group == "compress":
        item = params["runs"][key]
        # imported as a real one, so that Python leaves a __pycache__ in the folder depended on
        method = importlib.import_module(f"methods.{item['method']}.method").NAME
        model, moments = text(f"data/models/{item['model']}"), text("data/calibration/a")
        folder(f"data/compressed/{key}", f"{item} {method} {model} {moments}")
    elif group == "evaluate":
        digest = zlib.crc32(text(f"data/compressed/{key}").encode())
        metrics = {"bits": digest % 8, "loss": digest % 997 / params["evaluation"]["windows"]}
        for kind in ("metrics", "details"):
            file = Path(f"results/{kind}/{key}.json")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(metrics), encoding="utf-8")
    else:
        rows = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(METRICS.iterdir())]
        Path("results/report.html").write_text(f"<html>{rows}</html>", encoding="utf-8")
        lines = ["bits,loss", *(f"{row['bits']},{row['loss']}" for row in rows)]
        Path("results/report.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    stage = os.environ["DVC_STAGE"]
    with Path(os.environ["TOY_JOURNAL"]).open("a", encoding="utf-8") as journal:
        journal.write(stage + "\n")
    print(f"{stage} is at work", flush=True)
    if stage == os.environ.get("TOY_FAIL"):
        sys.exit("the toy broke")
    if stage == os.environ.get("TOY_HANG"):
        Path(os.environ["TOY_PID"]).write_text(str(os.getpid()), encoding="utf-8")
        time.sleep(60)
    if stage == os.environ.get("TOY_FILL"):
        filled = [bytearray(os.urandom(1 << 20) * 64) for _ in range(40)]  # 2.5 GB
        time.sleep(60)
    main(sys.argv[1], sys.argv[-1], yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8")))
