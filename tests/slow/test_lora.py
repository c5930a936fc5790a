"""Low-rank adapters against dense matrices, on several devices, in whole runs, and in Hugging Face's PEFT."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from rpt_jax import main
from rpt_jax.conversion import convert
from rpt_jax.distributed.mesh import make_mesh
from rpt_jax.distributed.sharding import init_parameters, make_reshard_fn
from rpt_jax.errors import UserError
from rpt_jax.infra.checkpoint import open_parameters
from rpt_jax.infra.metrics import read_metrics
from rpt_jax.model.lora import Lora, join_adapters, split_adapters
from rpt_jax.model.transformer import Params, Transformer, head, in_compute_dtype, prefill
from rpt_jax.weights.adapters import merged_tensors, write_adapters
from rpt_jax.weights.hf import load_policy, open_weights, save_policy, write_policy
from rpt_jax.weights.hf_config import to_hf_config
from rpt_jax.weights.model_files import WEIGHTS_FILE
from tests.helpers.hf_models import SHAPE
from tests.helpers.paths import TINY
from tests.helpers.policy_reference import SHALLOW, random_params
from tests.helpers.runs import COLD_START, EVERYTHING, comparable, experiment, interruption_after
from tests.helpers.sharded_results import assert_equal_steps, assert_shardings_kept, run_on_meshes

pytestmark = pytest.mark.slow

# Not all matrices, so that one without adapters is tested, too.
LORA = Lora(rank=3, alpha=6.0, targets=("q", "k", "o", "gate", "down"))
FIELDS = {"policy.lora.rank": 4, "policy.lora.alpha": 8, "policy.lora.targets": "q_proj,v_proj,o_proj,up_proj"}
MESHES = ["1x4x2x1", "2x2x2x2"]
ADAPTED = SHALLOW.clone(lora=LORA)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, SHALLOW.config.vocab, (2, 6)), jnp.int32)
LENGTHS = jnp.array([6, 6])


# --- Values and gradients ---


def merged(frozen: Params, adapters: Params) -> Params:
    """Return the dense parameters W + alpha / rank · A B of every matrix with adapters."""
    layers = dict(frozen["layers"])
    for name in LORA.targets:
        a = adapters["layers"][f"{name}_lora_a"]
        b = adapters["layers"][f"{name}_lora_b"]
        product = jnp.einsum("lir,lro->lio", a.reshape(len(a), -1, LORA.rank), b.reshape(len(b), LORA.rank, -1))
        layers[name] = layers[name] + LORA.alpha / LORA.rank * product.reshape(layers[name].shape)
    return frozen | {"layers": layers}


def loss(policy, params: Params) -> jax.Array:
    """Return a number that depends on every logit."""
    hidden, _, _ = prefill(policy, params, TOKENS, LENGTHS)
    logits = hidden @ head(policy, params).matrix_VxD.T
    return jnp.sum(jnp.sin(logits))


def test_values_and_gradients_equal_those_of_merged_matrices() -> None:
    frozen, adapters = split_adapters(random_params(ADAPTED, 0))
    assert set(adapters["layers"]) == {f"{name}_lora_{half}" for name in LORA.targets for half in "ab"}

    def with_adapters(adapters: Params) -> jax.Array:
        return loss(ADAPTED, join_adapters(frozen, adapters))

    def with_merged(adapters: Params) -> jax.Array:
        return loss(SHALLOW, merged(frozen, adapters))

    ours, theirs = (jax.jit(jax.value_and_grad(fn))(adapters) for fn in (with_adapters, with_merged))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4)
    assert abs(ours[0] - loss(SHALLOW, frozen)) > 0.1, "the adapters hardly change the policy"
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(theirs[1]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * scale), ours[1], theirs[1])


def test_a_new_policy_is_exactly_its_base() -> None:
    """Its base is stored in the dtype of decoding, which then copies nothing but the adapters."""
    policy = ADAPTED.clone(dtype=jnp.dtype("bfloat16"), head_precision="bfloat16")
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    params = init_parameters(policy, mesh, seed=0)
    frozen, adapters = split_adapters(params)
    hidden, base_hidden = (
        prefill(p, x, TOKENS, LENGTHS)[0] for p, x in ((policy, params), (policy.clone(lora=None), frozen))
    )
    np.testing.assert_array_equal(hidden, base_hidden)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(adapters))
    assert frozen["layers"]["q"].dtype == frozen["embedding"].dtype == jnp.bfloat16
    reshard = make_reshard_fn(policy, mesh, lambda params: in_compute_dtype(policy, params))
    assert reshard is not None
    decoding, _ = split_adapters(reshard(params))
    assert all(x is y for x, y in zip(jax.tree.leaves(frozen), jax.tree.leaves(decoding), strict=True))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    return run_on_meshes(tmp_path_factory.mktemp("sharded") / "out.npz", *MESHES, option="--lora")


@pytest.mark.parametrize("mesh", MESHES)
def test_sharded_equals_unsharded(results: dict[str, dict[str, np.ndarray]], mesh: str) -> None:
    assert_equal_steps(results, mesh)
    assert_shardings_kept(results, mesh)
    trained = {name for name in results[mesh] if name.startswith("params.")}
    assert trained and all("_lora_" in name for name in trained)


# --- Runs ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with a KL term, a moving average, documents and two minibatches."""
    workdir = tmp_path_factory.mktemp("finished")
    main.run(experiment(**EVERYTHING | FIELDS), workdir)
    return workdir


def test_the_trainer_scores_what_the_sampler_samples_from(finished: Path) -> None:
    lines = read_metrics(finished / "metrics.jsonl")[1:]
    assert all(line["mismatch/max"] < 1e-4 for line in lines)
    assert all(line["gradient/norm"] > 0 for line in lines), "the run tests too little"


def test_an_interrupted_run_resumes_to_the_same_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    with interruption_after(2, monkeypatch):
        main.run(experiment(**EVERYTHING | FIELDS), tmp_path)
    main.run(experiment(**EVERYTHING | FIELDS), tmp_path)
    assert comparable(tmp_path) == comparable(finished)


def test_adapters_of_another_base_are_refused(tmp_path: Path, finished: Path) -> None:
    workdir = Path(shutil.copytree(finished, tmp_path / "run"))
    other = Path(shutil.copytree(TINY, tmp_path / "other"))
    config, params, fingerprint = load_policy(other)
    params["norm"] = params["norm"] * 1.001
    save_policy(other, config, params, {}, fingerprint)
    more = EVERYTHING | FIELDS | {"training.total_steps": 4, "policy.path": other}
    with pytest.raises(UserError) as raised:
        main.run(experiment(**more), workdir, force=True)
    assert raised.value.field == "policy.path"


def test_a_checkpoint_holds_adapters_alone_and_is_exported(tmp_path: Path, finished: Path) -> None:
    """Merged, it is the policy that the run has written; alone, it is what PEFT reads."""
    checkpoint = finished / "checkpoints" / "3"
    stored = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    assert stored < (TINY / WEIGHTS_FILE).stat().st_size / 5
    convert(checkpoint, tmp_path / "merged")
    ours = load_file(tmp_path / "merged" / WEIGHTS_FILE)
    theirs = load_file(finished / "policy" / WEIGHTS_FILE)
    base = load_file(TINY / WEIGHTS_FILE)
    assert ours.keys() == theirs.keys() == base.keys()
    adapted = {"q_proj", "v_proj", "o_proj", "up_proj"}
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])
        changed = not np.array_equal(ours[name], base[name].astype(np.float32))
        assert changed == bool(adapted & set(name.split("."))), name
    convert(finished, tmp_path / "adapters", adapters=True)
    adapters = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    _, read = open_parameters(finished, None)
    np.testing.assert_array_equal(
        adapters["base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"], read(("layers", "v_lora_a"))[1].T
    )


def test_a_cold_start_trains_adapters_of_its_own(tmp_path: Path) -> None:
    """The run then starts from their merged policy, which a learning rate of 0 does not change."""
    main.run(experiment(**COLD_START | FIELDS), tmp_path)
    trained = load_file(tmp_path / "cold_start" / "policy" / WEIGHTS_FILE)
    final = load_file(tmp_path / "policy" / WEIGHTS_FILE)
    base = load_file(TINY / WEIGHTS_FILE)
    for name in base:
        np.testing.assert_array_equal(final[name], trained[name])
    query = "model.layers.0.self_attn.q_proj.weight"
    assert not np.array_equal(trained[query], base[query].astype(np.float32))


def test_a_run_without_adapters_has_none_to_export(tmp_path: Path) -> None:
    main.run(experiment(**COLD_START), tmp_path / "run")
    with pytest.raises(UserError) as raised:
        convert(tmp_path / "run", tmp_path / "adapters", adapters=True)
    assert raised.value.field == "--adapters"


# --- PEFT ---


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_peft_loads_adapters_with_equal_logits(tmp_path: Path, qkv_bias: bool) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft", reason="an optional extra: pip install -e '.[peers]'")
    config = dataclasses.replace(SHAPE, qkv_bias=qkv_bias)
    policy = Transformer(config, lora=LORA)
    params = random_params(policy, 0)
    frozen, adapters = split_adapters(params)
    save_policy(tmp_path / "base", config, frozen, {}, "")
    (tmp_path / "adapters").mkdir()
    get_adapter = jax.device_get(adapters["layers"]).__getitem__
    write_adapters(tmp_path / "adapters", str(tmp_path / "base"), config, LORA, get_adapter)
    tensors = merged_tensors(open_weights(tmp_path / "base", config), config, LORA, get_adapter)
    write_policy(tmp_path / "merged", to_hf_config(config) | {"torch_dtype": "float32"}, tensors, {})

    tokens = np.random.default_rng(0).integers(0, config.vocab, (2, 6))
    hidden, _, _ = prefill(policy, params, jnp.asarray(tokens, jnp.int32), LENGTHS)
    ours = hidden @ head(policy, params).matrix_VxD.T
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="float32")
    with torch.no_grad():
        plain = base(torch.from_numpy(tokens)).logits.numpy()
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapters").eval()(torch.from_numpy(tokens))
        merged_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32")
        merged_logits = merged_model(torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(adapted.logits.numpy() - plain).max() > 0.1, "the adapters hardly change the policy"
    scale = np.abs(ours).max()
    np.testing.assert_allclose(adapted.logits.numpy(), ours, atol=1e-5 * scale)
    np.testing.assert_allclose(merged_logits, ours, atol=1e-5 * scale)
