"""What the choice of attention buys: validation loss of all six types, several seeds, parameters as they fall and matched.

    python benchmarks/quality.py filepath=tinyshakespeare.txt
    python benchmarks/quality.py filepath=tinyshakespeare.txt num_steps=2000 seeds=5 results=long.jsonl

Every arm is experiment=fast_cpu (without its query and key norms, which three of the types cannot have) with nothing changed
but model.mha_type, model.match and the seed; loss over the whole validation split after the last step, no choice of
checkpoint. Matched: d_ff is changed so that all have as many weights as standard (model.match=params). The same seed draws
the same batches, so differences to standard are taken seed by seed.

One process per core, each single-threaded. Finished arms are kept in the results file: the same command goes on.
"""

import json
import multiprocessing
import os
import platform
import statistics
import sys
from pathlib import Path

CONFIGS = str(Path(__file__).parents[1] / "configs")
TYPES = ("standard", "selective", "mqa", "gqa", "mla", "equinox")
OPTIONS = {"filepath": "", "num_steps": "1000", "seeds": "3", "results": "quality.jsonl"}


def train_arms(core: int, arms: list[tuple[str, str, int]], options: dict[str, str], queue: multiprocessing.Queue) -> None:
    """Train one arm after another on one core, and report each."""
    os.sched_setaffinity(0, {core})
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    import equinox as eqx
    import jax.numpy as jnp
    from hydra import compose, initialize_config_dir

    from chargpt import config as chargpt_config
    from chargpt.corpus import load_corpus, make_windows
    from chargpt.flops import count_parameters
    from chargpt.train import eval_batch_size, evaluate, init_state, train_steps

    chargpt_config.register()
    for kind, match, seed in arms:
        overrides = ["experiment=fast_cpu", "model.qk_norm=false", f"model.mha_type={kind}", f"model.match={match}"]
        overrides += [f"seed={seed}", f"trainer.num_steps={options['num_steps']}"]
        overrides += ["dataset.name=file", f"dataset.filepath={options['filepath']}"] if options["filepath"] else []
        with initialize_config_dir(CONFIGS, version_base="1.3"):
            config = chargpt_config.parse(compose("default", overrides))
        corpus = load_corpus(config.dataset)
        windows = make_windows(corpus.val, config.dataset.seq_len)
        state = init_state(config, len(corpus.tokenizer))
        steps = eqx.filter_jit(lambda t, s, n, config=config: train_steps(s, t, config, n), donate="all-except-first")
        tokens, left, chunk = jnp.asarray(corpus.train), config.trainer.num_steps, config.trainer.log_every
        while left:
            state, _ = steps(tokens, state, min(left, chunk))
            left -= min(left, chunk)
        scores = evaluate(state.averaged, windows, eval_batch_size(windows), config.trainer.precision)
        queue.put(
            {
                "type": kind,
                "match": match,
                "seed": seed,
                "val_loss": scores["val/loss"],
                "d_ff": state.model.blocks.feed_forward.up_proj.out_features,
                "num_params": sum(count_parameters(state.model).values()),
            }
            | options
        )
    queue.put(None)


def print_table(results: list[dict], match: str, seeds: range) -> None:
    loss = {(r["type"], r["seed"]): r["val_loss"] for r in results if r["match"] == match}
    facts = {r["type"]: r for r in results if r["match"] == match}
    print(f"\n{'parameters matched' if match == 'params' else 'parameters as they fall'}\n")
    print("| type | parameters | d_ff | loss, mean | spread | minus standard, mean | spread |\n|---|---|---|---|---|---|---|")
    for kind in TYPES:
        losses = [loss[kind, seed] for seed in seeds]
        differences = [loss[kind, seed] - loss["standard", seed] for seed in seeds]
        spread = lambda values: statistics.stdev(values) if len(values) > 1 else float("nan")  # noqa: E731
        paired = "| |" if kind == "standard" else f"| {statistics.mean(differences):+.4f} | {spread(differences):.4f} |"
        print(
            f"| {kind} | {facts[kind]['num_params']:,} | {facts[kind]['d_ff']} | {statistics.mean(losses):.4f} "
            f"| {spread(losses):.4f} {paired}"
        )


def main(arguments: list[str]) -> None:
    options = dict(OPTIONS)
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in options or (name in ("num_steps", "seeds") and (not value.isdigit() or int(value) < 1)):
            sys.exit(f"error: {argument}: write {' or '.join(options)} = a value")
        options[name] = value
    if options["filepath"]:
        options["filepath"] = str(Path(options["filepath"]).resolve())
    path, seeds = Path(options.pop("results")), range(int(options.pop("seeds")))
    arms = [(kind, match, seed) for seed in seeds for match in ("none", "params") for kind in TYPES]
    arms = [arm for arm in arms if arm[:2] != ("standard", "params")]  # the same as unmatched
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    results = [result for result in results if all(result[name] == value for name, value in options.items())]
    done = {(result["type"], result["match"], result["seed"]) for result in results}
    arms = [arm for arm in arms if arm not in done]

    context, cores = multiprocessing.get_context("spawn"), sorted(os.sched_getaffinity(0))
    queue = context.Queue()
    workers = [
        context.Process(target=train_arms, args=(core, arms[i :: len(cores)], options, queue)) for i, core in enumerate(cores)
    ]
    for worker in workers:
        worker.start()
    running = len(workers)
    while running:
        result = queue.get()
        running -= result is None
        if result is not None:
            results.append(result)
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            print(
                f"{result['type']}, match={result['match']}, seed {result['seed']}: {result['val_loss']:.4f}", file=sys.stderr
            )
    for worker in workers:
        worker.join()
    results += [result | {"match": "params"} for result in results if result["type"] == "standard"]
    print(f"python {platform.python_version()}, {len(cores)} cores; {options['num_steps']} steps, seeds {list(seeds)}")
    for match in ("none", "params"):
        print_table(results, match, seeds)


if __name__ == "__main__":
    main(sys.argv[1:])
