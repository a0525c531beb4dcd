"""Print what recipes of ``pplex models convert`` make of a model, as a Markdown table.

    python tests/recipe_table.py mini samples/*.wav

For each recipe: the language model's size, the mean divergence from the model itself
and the shares of frames with the same first choice, on conversations that the model
had with the recordings; and in how many greedy conversations the agent still says the
same words. With ``--sensitivity FILE`` the mixed recipes go by that file of
`pplex models sensitivity`. With ``--write DIR`` every model is also written there in
NVIDIA's layout, its weights as float32 numbers, for programs that know nothing else:

    for m in DIR/*; do python samples/mini/evaluate.py WORK "$m"; done

counts mini's right replies and word errors.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from pplex.checkpoint.hub import LocalModel, resolve
from pplex.checkpoint.layouts import Matrix, Quantization, published_matrices
from pplex.checkpoint.source import Source
from pplex.conversation.prompts import make_role
from pplex.conversation.roles import DEFAULT_ROLE, ROLES
from pplex.conversation.session import Model, load
from pplex.model.sampling import GREEDY, SamplingConfig
from pplex.quantization.compare import compare, keep_logits, mean_kl
from pplex.quantization.compare_models import Settings, make_scripts, read_users
from pplex.quantization.convert import Conversion, convert
from pplex.quantization.costs import mixed_recipe, read_costs
from pplex.quantization.forced import write_script
from pplex.quantization.recipe import Recipe, fitting, recipe_bytes, uniform

HEAD = "| recipe | MB | mean KL | KL of text | same text | same codes | same words |"
Make = Callable[[Source, list[Matrix]], Recipe]


def everything(matrices: list[Matrix], form: Quantization) -> Recipe:
    """All matrices in one form, tables and heads as well."""
    return {matrix.name: fitting(matrix, form) for matrix in matrices}


def recipes(costs: Mapping[str, float]) -> dict[str, tuple[Make, bool]]:
    """Recipes by name, and whether scales are refined."""
    q4 = Quantization(4, 64)

    def alike(bits: int, group_size: int) -> Make:
        return lambda source, m: uniform(m, Quantization(bits, group_size))

    def like_uniform(source: Source, m: list[Matrix]) -> Recipe:
        return mixed_recipe(source.config, m, q4, None, costs)

    def like_everything(source: Source, m: list[Matrix]) -> Recipe:
        size = recipe_bytes(m, everything(m, q4))
        return mixed_recipe(source.config, m, q4, size, costs)

    return {
        "uniform 8/64": (alike(8, 64), False),
        "uniform 4/32": (alike(4, 32), False),
        "uniform 4/64": (alike(4, 64), False),
        "uniform 4/64, refined": (alike(4, 64), True),
        "mixed, no larger": (like_uniform, False),
        "mixed, no larger, refined": (like_uniform, True),
        "everything 4/64": (lambda source, m: everything(m, q4), False),
        "everything 4/64, refined": (lambda source, m: everything(m, q4), True),
        "mixed, no larger than that": (like_everything, False),
        "mixed, no larger than that, refined": (like_everything, True),
    }


def words(model: Model, users: list[np.ndarray], text: str) -> list[np.ndarray]:
    """The text tokens (frames,) of greedy conversations."""
    prompt = make_role(model, None, text).prompt
    scripts = [write_script(model.engine, prompt, u, GREEDY, 0)[0] for u in users]
    return [script.columns[0] for script in scripts]


def write_plain(local: LocalModel, base: Path, to: Path) -> None:
    """The model with its weights as float32 numbers, and the other files of base."""
    config = load(local).config
    source = Source(local.folder, config.lm)
    arrays = {}
    for matrix in published_matrices(config.lm, source.steps, source.steps):
        targets = [t for t in matrix.targets if t][
            : 1 if len(matrix.shape) == 1 else 99
        ]
        whole = mx.concatenate([source.dense(t) for t in targets]).astype(mx.float32)
        arrays[matrix.name] = whole if whole.ndim == 2 else whole[None, None]
    shutil.copytree(base, to, ignore=shutil.ignore_patterns("model.safetensors"))
    mx.save_safetensors(str(to / "model.safetensors"), arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("recordings", nargs="+", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--sensitivity", type=Path)
    parser.add_argument("--only", default="", help="recipes whose names contain this")
    parser.add_argument("--write", type=Path, metavar="DIR")
    args = parser.parse_args()
    base = resolve(args.model, offline=True)
    if args.write:
        args.write.mkdir()
    model = load(base)
    settings = Settings(None, ROLES[DEFAULT_ROLE], 1, args.seconds, SamplingConfig())
    users = read_users(args.recordings, model.config, args.seconds)
    scripts = make_scripts(model, users, settings)
    kept = [keep_logits(model.engine, script) for script in scripts]
    said = words(model, users, settings.text)
    frames = sum(script.num_frames for script in scripts)
    print(f"{len(users)} recordings, {frames} frames, --seconds {args.seconds:g}\n")
    print(HEAD, "| --- " * HEAD.count(" | ") + "| --- |", sep="\n", flush=True)
    for name, (make, refine) in recipes(read_costs(args.sensitivity)).items():
        if args.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "model"
            how = Conversion(make, name, "python tests/recipe_table.py", refine)
            done = convert(base, target, how, lambda n: None, lambda n: None)
            local = resolve(str(target), offline=True)
            model = load(local)
            if args.write:
                write_plain(local, base.path, args.write / name.replace("/", "-"))
            again = words(model, users, settings.text)
        found = compare(kept, model.engine, scripts, settings.sampling)
        text, *agent = found
        same = sum(map(np.array_equal, again, said))
        codes = np.mean([stream.top1 for stream in agent])
        print(
            f"| {name} | {done.lm_bytes / 1e6:.2f} | {mean_kl(found):.2g} "
            f"| {text.kl:.2g} | {text.top1:.2%} | {codes:.2%} "
            f"| {same} of {len(users)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
