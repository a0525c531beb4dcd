"""Feed a reader with broken files for a while: python tests/fuzz/fuzz.py NAME SECONDS.

A run that crashes, takes over 10 s for a file or over 2 GB of memory stops, and the
file is kept in ``tests/fuzz/corpus/NAME``.
"""

from __future__ import annotations

import hashlib
import os
import random
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.extend(str(folder) for folder in Path(__file__).parents[:3])

from mutate import mutate
from targets import CORPUS, TARGETS, corpus, run

MAX_SECONDS = 10
MAX_BYTES = 2 << 30


def fuzz(name: str, seconds: float, seed: int) -> int:
    """Run one target; the number of files tried."""
    target = TARGETS[name]
    rng = random.Random(seed)
    pool = [*target.seeds(), *(path.read_bytes() for path in corpus(name))]
    seen: set[str] = set()
    tried = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        path = Path(folder) / f"case{target.suffix}"
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            content = mutate(rng.choice(pool), rng, pool)
            path.write_bytes(content)
            # Kept where even the death of this process leaves it.
            (Path(tempfile.gettempdir()) / f"pplex-fuzz-{name}").write_bytes(content)
            signal.alarm(MAX_SECONDS)
            try:
                outcome = run(target, path).replace(str(path), "")
            except BaseException:
                digest = hashlib.sha256(content).hexdigest()[:12]
                (CORPUS / name).mkdir(parents=True, exist_ok=True)
                (CORPUS / name / digest).write_bytes(content)
                raise
            finally:
                signal.alarm(0)
            tried += 1
            # A new kind of refusal leads somewhere new.
            kind = "".join(c for c in outcome if not c.isdigit())[:60]
            if kind not in seen:
                seen.add(kind)
                pool.append(content)
    return tried


def main() -> None:
    name, seconds = sys.argv[1], float(sys.argv[2])
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else int(time.time())
    start = time.monotonic()
    tried = fuzz(name, seconds, seed)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert peak_mb * (1 << 20) < MAX_BYTES, f"{peak_mb:.0f} MB of memory"
    spent = time.monotonic() - start
    print(f"{name}: {tried} files in {spent:.0f} s, peak {peak_mb:.0f} MB, seed {seed}")


if __name__ == "__main__":
    main()
