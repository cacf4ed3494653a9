"""`chargpt convert`: a trained model as one with another type of attention."""

import dataclasses

import equinox as eqx
import jax

from chargpt.attention import abstract, filled_in, make_attention
from chargpt.attention.conversion import Pool, convert
from chargpt.checkpoint import Which, open_run
from chargpt.compose import change, read_overrides
from chargpt.config import Match, did_you_mean
from chargpt.errors import note, require
from chargpt.model import feed_forward_width
from chargpt.origin import shapes_of
from chargpt.train import Stream, random_key
from chargpt.weights import at_step_0, new_directory, write_run

CHANGES = ("model.mha_type", "model.num_kv_heads")


@dataclasses.dataclass
class ConvertOptions:
    """A trained model whose attention becomes of another type, as a run directory at step 0."""

    overrides: tuple[str, ...] = ()  # what to change, such as model.mha_type=gqa
    run: str | None = None  # run directory; by default the newest one
    checkpoint: Which = Which.best  # best | last
    out: str = ""  # the directory to create
    pool: Pool | None = None  # mean | first | random: how heads become one; null = mean

    def __post_init__(self) -> None:
        require(self.out != "", "out: is missing; write out=NEWDIR")
        names = read_overrides(self.overrides)
        require(bool(names), "nothing to convert to; write model.mha_type=gqa, say")
        for name in names:
            ours = name in CHANGES or name.startswith("model.mla.")
            hint = did_you_mean(name, [field.name for field in dataclasses.fields(self)])
            rule = f"a conversion changes {', '.join(CHANGES)} and model.mla.* alone; leave it out"
            require(ours, f"{name}: {rule}{hint}")


def convert_run(options: ConvertOptions) -> None:
    """Write the converted model; `init_from` it to train on."""
    out = new_directory("out", options.out)
    _, state, header = open_run(options.run, options.checkpoint)
    model = state.averaged
    # The feed-forward layers stay as they are, also where their width had been chosen to match
    width = feed_forward_width(header.config.model)
    own = {"model.match": Match.none, "model.d_ff": width, "init_from": None}
    config = change(header.config, own | read_overrides(options.overrides))
    layers = jax.random.split(random_key(config.seed, Stream.init), model.num_layers)
    wanted = abstract(make_attention, config.model)
    pooled = eqx.filter_vmap(lambda layer, key: convert(layer, wanted, options.pool, key=key))
    found = pooled(model.stacked.attention, layers)
    had, asked = header.config.model.mha_type.name, config.model.mha_type.name
    none = f"model.mha_type={asked}: there is no conversion from {had}"
    require(found is not None, f"{none}; write gqa, mqa or mla, for a run of standard, gqa or mqa")
    attention, errors = found
    model = eqx.tree_at(lambda model: model.stacked.attention, model, attention)
    model = filled_in(shapes_of(config, len(header.vocabulary)), model)
    note(f"what is lost of W_k and W_v, by layer: {', '.join(f'{each:.2%}' for each in errors)}")
    write_run(out, at_step_0(config, header.vocabulary, header.corpus_sha256), model)
