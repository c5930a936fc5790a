"""The policy against the NumPy reference: forward pass, branches, rematerialization, and saving and loading."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rpt_jax.errors import UserError
from rpt_jax.model.model_config import PRESETS, check_preset, preset
from rpt_jax.model.transformer import Transformer, branch_hidden, head, prefill, rms_norm, rotary_angles, rotate
from rpt_jax.weights.hf import load_model_config, load_policy, save_policy
from rpt_jax.weights.model_files import WEIGHTS_FILE
from tests.helpers import policy_reference as reference
from tests.helpers.parameters import mostly_slow
from tests.helpers.policy_reference import MOE_SHAPE, POLICY, SHALLOW, SHAPE, random_params

# Grouped, full and multi-query attention.
VARIANTS = {
    "llama": SHAPE,
    "qwen2": dataclasses.replace(SHAPE, kv_heads=4, qkv_bias=True, tied=False, rope_base=1e6, norm_epsilon=1e-5),
    "qwen3": dataclasses.replace(SHAPE, kv_heads=1, qk_norm=True, head_size=6, layers=7),
    "qwen3_moe": MOE_SHAPE,
    "qwen3_moe, not normalized": dataclasses.replace(MOE_SHAPE, normalize_expert_weights=False, experts_per_token=1),
}
LENGTHS = np.array([1, 4, 6], np.int32)
PROMPTS = np.random.default_rng(1).integers(0, SHAPE.vocab, (3, 6)).astype(np.int32)
RESPONSES = np.random.default_rng(2).integers(0, SHAPE.vocab, (3, 2, 5)).astype(np.int32)

hidden_of_branches = jax.jit(branch_hidden, static_argnames="policy")


def identical_trees(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y) and x.dtype == y.dtype, a, b))


# --- the forward pass ---


@pytest.mark.parametrize("name", mostly_slow(VARIANTS, "qwen3"))
def test_each_branch_equals_its_sequence_run_alone(name):
    """The padding of the prompts is random ids, which must not affect any response."""
    config = VARIANTS[name]
    params = random_params(Transformer(config), 0)
    ours = hidden_of_branches(Transformer(config), params, PROMPTS, LENGTHS, RESPONSES)
    for p, g in np.ndindex(RESPONSES.shape[:2]):
        prompt = PROMPTS[p, : LENGTHS[p]]
        alone = reference.hidden(params, config, [*prompt, *RESPONSES[p, g]])
        # Each token is predicted by the state of the token before it; the last state predicts nothing.
        np.testing.assert_allclose(ours[p, g], alone[len(prompt) - 1 : -1], atol=1e-5)


def test_padding_has_no_effect():
    params = random_params(POLICY, 0)
    ours = hidden_of_branches(POLICY, params, PROMPTS, LENGTHS, RESPONSES)
    other = np.where(np.arange(6) < LENGTHS[:, None], PROMPTS, (PROMPTS + 7) % SHAPE.vocab)
    assert (other != PROMPTS).any()
    np.testing.assert_array_equal(hidden_of_branches(POLICY, params, other, LENGTHS, RESPONSES), ours)


def test_prefill_returns_all_states_and_those_of_the_last_tokens():
    params = random_params(POLICY, 3)
    hidden_PxSxD, context, last_PxD = jax.jit(prefill, static_argnames="policy")(POLICY, params, PROMPTS, LENGTHS)
    assert context.kv.k.shape == context.kv.v.shape == (SHAPE.layers, 3, SHAPE.kv_heads, 1, 6, SHAPE.head_size)
    assert context.begin_NxGxQ is None
    np.testing.assert_array_equal(context.end_NxGxQ[:, 0, 0], LENGTHS)
    for p, length in enumerate(LENGTHS):
        alone = reference.hidden(params, SHAPE, PROMPTS[p, :length])
        np.testing.assert_allclose(hidden_PxSxD[p, :length], alone, atol=1e-5)
        np.testing.assert_allclose(last_PxD[p], alone[-1], atol=1e-5)


def test_packed_sequences_attend_to_themselves_and_their_prefix():
    """Two sequences packed into one branch, each continuing another prefix of the same document."""
    params, document, packed = random_params(POLICY, 0), PROMPTS[2], [RESPONSES[0, 0, :3], RESPONSES[0, 1, :2]]
    prefixes, segments = np.repeat([2, 5], [3, 2]), np.repeat([1, 2], [3, 2])
    positions = prefixes + np.array([0, 1, 2, 0, 1])

    @jax.jit
    def run(params):
        _, context, _ = prefill(POLICY, params, document[None], np.array([6], np.int32))
        context = context._replace(end_NxGxQ=prefixes[None, None])
        tokens = np.concatenate(packed)[None, None]
        return POLICY.apply({"params": params}, tokens, positions[None, None], (context,), segments[None, None])[0]

    ours, start = run(params)[0, 0], 0
    for tokens, prefix in zip(packed, (2, 5), strict=True):
        alone = reference.hidden(params, SHAPE, [*document[:prefix], *tokens])[prefix:]
        np.testing.assert_allclose(ours[start : start + len(tokens)], alone, atol=1e-5)
        start += len(tokens)


def test_remat_changes_neither_outputs_nor_gradients():
    params, weights = random_params(SHALLOW, 0), np.random.default_rng(4).standard_normal((3, 6, SHAPE.width))

    @jax.jit
    def both(params):
        def loss(params, policy):
            return jnp.sum(prefill(policy, params, PROMPTS, LENGTHS)[0] * weights)

        return [jax.value_and_grad(loss)(params, SHALLOW.clone(remat=remat)) for remat in ("none", "dots", "full")]

    (value, grads), *others = both(params)
    for value_remat, grads_remat in others:
        np.testing.assert_allclose(value, value_remat, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads, grads_remat)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(grads)), "a parameter has no gradient"


@pytest.mark.parametrize("name", VARIANTS)
def test_the_config_counts_its_parameters(name):
    params = random_params(Transformer(VARIANTS[name]), 0)
    config = VARIANTS[name]
    assert config.parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
    matrices = {name: leaf.size for name, leaf in params["layers"].items() if "norm" not in name and "bias" not in name}
    assert config.layer_matrix_parameters == sum(matrices.values())
    # Of the experts, a token is multiplied with those that it runs through.
    if config.experts:
        matrices |= {
            name: matrices[name] * config.experts_per_token // config.experts for name in ("gate", "up", "down")
        }
    assert config.matmul_parameters == sum(matrices.values()) + head(Transformer(config), params).matrix_VxD.size


def test_presets_are_consistent():
    assert 14.7e9 < preset("qwen2.5-14b").parameters < 14.8e9  # "14.7B" on its model card.
    for config in PRESETS.values():
        assert config.heads % config.kv_heads == 0 and config.head_size % 2 == 0


def test_an_unknown_preset_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="Did you mean 'tiny'") as raised:
        preset("tinny")
    assert raised.value.field == "policy.preset"


def test_a_policy_that_is_not_the_preset_is_refused_with_the_fields_that_differ():
    check_preset("model", "", SHAPE)
    check_preset("model", "tiny", dataclasses.replace(preset("tiny"), context=7))
    with pytest.raises(UserError, match="layers 5 instead of 4") as raised:
        check_preset("model", "tiny", dataclasses.replace(preset("tiny"), layers=5))
    assert raised.value.field == "policy.preset"


# --- parts of a layer ---


def test_rms_norm_equals_the_reference():
    x, scale = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32) * 5, np.linspace(0.5, 2, 8)
    np.testing.assert_allclose(rms_norm(x, scale, 1e-6), reference.rms_norm(x, scale, 1e-6), rtol=1e-5)
    tiny = np.full((1, 8), 1e-4, np.float32)
    np.testing.assert_allclose(rms_norm(tiny, scale, 1e-6), reference.rms_norm(tiny, scale, 1e-6), rtol=1e-5)


def test_rms_norm_of_bfloat16_is_computed_in_float32():
    # Squares of 300, summed 300 times, need more than the 8 bits of bfloat16's mantissa.
    x = jnp.full((1, 300), 300.0, jnp.bfloat16).at[0, 0].set(-300)
    normed = rms_norm(x, jnp.ones(300), 1e-6)
    assert normed.dtype == jnp.bfloat16
    np.testing.assert_array_equal(normed, np.sign(x))


def test_rotary_embedding_equals_a_complex_rotation():
    x = np.random.default_rng(0).standard_normal((1, 1, 9, 2, 6)).astype(np.float32)
    cos, sin = rotary_angles(np.arange(9)[None, None], 6, 10_000.0)
    assert cos.shape == (1, 1, 9, 1, 3)
    ours = rotate(x, cos, sin)
    np.testing.assert_allclose(ours, reference.rotate(x.swapaxes(2, 3), 10_000.0).swapaxes(2, 3), atol=1e-5)


def test_rotary_embedding_distinguishes_late_positions():
    """bfloat16 rounds 257 to 256, so positions must be integers or float32."""
    cos, sin = rotary_angles(jnp.array([[[256, 257, 8191]]]), 2, 10_000.0)
    np.testing.assert_allclose(cos[0, 0, :, 0, 0], np.cos([256, 257, 8191]), atol=1e-5)
    np.testing.assert_allclose(sin[0, 0, :, 0, 0], np.sin([256, 257, 8191]), atol=1e-5)


# --- saving and loading ---


TOKENIZER_FILES = {"tokenizer.model": b"a tokenizer"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return {variant: (directory, parameters)}."""
    root = tmp_path_factory.mktemp("policies")
    policies = {}
    for name, config in VARIANTS.items():
        params = random_params(Transformer(config), 5)
        save_policy(root / name, config, params, TOKENIZER_FILES, f"sha of {name}")
        policies[name] = root / name, params
    return policies


@pytest.mark.parametrize("name", VARIANTS)
def test_saving_and_loading_is_exact(saved, name):
    directory, params = saved[name]
    config, loaded, fingerprint = load_policy(directory)
    assert (config, fingerprint) == (VARIANTS[name], f"sha of {name}") == load_model_config(directory)
    assert identical_trees(loaded, params)
    assert (directory / "tokenizer.model").read_bytes() == b"a tokenizer"


def hugging_face_logits(directory, tokens) -> np.ndarray:
    """Compute logits from exported files as Hugging Face's Llama and Qwen classes do, transcribed to NumPy."""
    config = json.loads((directory / "config.json").read_text())
    w = {name: tensor.astype(np.float64) for name, tensor in load_file(directory / WEIGHTS_FILE).items()}
    eps, heads, kv_heads = config["rms_norm_eps"], config["num_attention_heads"], config["num_key_value_heads"]
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        layer = {name.removeprefix(f"model.layers.{i}."): t for name, t in w.items() if f"layers.{i}." in name}
        y = reference.rms_norm(x, layer["input_layernorm.weight"], eps)

        def project(kind, count, layer=layer, y=y):
            out = y @ layer[f"self_attn.{kind}_proj.weight"].T + layer.get(f"self_attn.{kind}_proj.bias", 0)
            out = out.reshape(len(y), count, config["head_dim"])
            norm = layer.get(f"self_attn.{kind}_norm.weight")
            return (out if norm is None else reference.rms_norm(out, norm, eps)).swapaxes(0, 1)

        q = reference.rotate(project("q", heads), config["rope_theta"])
        k = np.repeat(reference.rotate(project("k", kv_heads), config["rope_theta"]), heads // kv_heads, axis=0)
        v = np.repeat(project("v", kv_heads), heads // kv_heads, axis=0)
        out = np.concatenate([reference.causal_attention(q[h], k[h], v[h]) for h in range(heads)], axis=-1)
        x = x + out @ layer["self_attn.o_proj.weight"].T
        y = reference.rms_norm(x, layer["post_attention_layernorm.weight"], eps)

        def swiglu(y, prefix, layer=layer):
            gate, up, down = (layer[f"{prefix}.{kind}_proj.weight"].T for kind in ("gate", "up", "down"))
            return reference.swiglu(y, gate, up, down)

        if "mlp.gate.weight" not in layer:
            x = x + swiglu(y, "mlp")
            continue
        probabilities = reference.softmax(y @ layer["mlp.gate.weight"].T)
        for s, row in enumerate(probabilities):
            chosen = np.argsort(-row)[: config["num_experts_per_tok"]]
            total = row[chosen].sum() if config["norm_topk_prob"] else 1
            x[s] = x[s] + sum(row[e] / total * swiglu(y[s], f"mlp.experts.{e}") for e in chosen)
    x = reference.rms_norm(x, w["model.norm.weight"], eps)
    return x @ w["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"].T


@pytest.mark.parametrize("name", VARIANTS)
def test_exported_tensors_give_the_same_logits_in_hugging_face_models(saved, name):
    directory, params = saved[name]
    theirs = hugging_face_logits(directory, PROMPTS[2])
    np.testing.assert_allclose(theirs, reference.logits(params, VARIANTS[name], PROMPTS[2]), atol=1e-9)


@pytest.fixture
def copy(saved, tmp_path):
    """Return a directory of the qwen2 variant that a test may damage, and a function that rewrites its tensors."""
    _, params = saved["qwen2"]
    save_policy(tmp_path, VARIANTS["qwen2"], params, TOKENIZER_FILES, "sha")

    def rewrite(change):
        tensors = load_file(tmp_path / WEIGHTS_FILE)
        change(tensors)
        save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, tmp_path / WEIGHTS_FILE)

    return tmp_path, rewrite


K_PROJ = "model.layers.1.self_attn.k_proj.weight"
SURPLUS_LAYER = "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        (lambda t: t.pop(K_PROJ), K_PROJ),
        (lambda t: t.update({K_PROJ: t[K_PROJ].T}), K_PROJ),
        (lambda t: t[K_PROJ].__setitem__((3, 2), np.nan), K_PROJ),
        (lambda t: t[K_PROJ].__setitem__((3, 2), -np.inf), K_PROJ),
        (lambda t: t.update({"lm_head.bias": t["model.norm.weight"]}), "lm_head.bias"),
        (lambda t: t.update({SURPLUS_LAYER: t["model.norm.weight"]}), SURPLUS_LAYER),
    ],
    ids=["missing", "wrong shape", "NaN", "infinity", "unknown", "a layer too many"],
)
def test_weights_with_a_wrong_tensor_are_refused(copy, change, tensor):
    directory, rewrite = copy
    rewrite(change)
    with pytest.raises(UserError, match=re.escape(tensor)) as raised:
        load_policy(directory)
    assert raised.value.field == str(directory / WEIGHTS_FILE)


@pytest.mark.parametrize("kept", [0, 6, 200, -4])
def test_truncated_weights_are_refused(copy, kept):
    directory, _ = copy
    data = (directory / WEIGHTS_FILE).read_bytes()
    (directory / WEIGHTS_FILE).write_bytes(data[:kept])
    with pytest.raises(UserError) as raised:
        load_policy(directory)
    assert raised.value.field == str(directory / WEIGHTS_FILE)


def test_missing_weights_are_refused(copy):
    directory, _ = copy
    (directory / WEIGHTS_FILE).unlink()
    with pytest.raises(UserError) as raised:
        load_policy(directory)
    assert raised.value.field == str(directory / WEIGHTS_FILE)


def assert_config_is_refused(directory, key: str | None = None) -> None:
    with pytest.raises(UserError, match=key) as raised:
        load_model_config(directory)
    assert raised.value.field == str(directory / "config.json")


def test_a_config_that_cannot_be_parsed_is_refused(copy):
    directory, _ = copy
    path = directory / "config.json"
    for data in (path.read_bytes()[:-20], b"\xff\xfe{}", b"[]", b"3", b"null"):
        path.write_bytes(data)
        assert_config_is_refused(directory)


def test_a_directory_without_config_is_refused(copy):
    directory, _ = copy
    (directory / "config.json").unlink()
    for source in (directory, directory / "nowhere"):
        with pytest.raises(UserError) as raised:
            load_model_config(source)
        assert raised.value.field == "policy.path"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"intermediate_size": 24.5}, "intermediate_size"),
        ({"head_dim": 7}, "head_dim"),
        ({"rope_theta": None}, "rope_theta"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ],
    ids=str,
)
def test_a_config_with_an_invalid_value_is_refused(copy, change, key):
    directory, _ = copy
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert_config_is_refused(directory, key)


def test_a_config_without_a_required_value_is_refused(copy):
    directory, _ = copy
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for key in ("model_type", "hidden_size"):
        path.write_text(json.dumps({k: v for k, v in config.items() if k != key}))
        assert_config_is_refused(directory, key)


def test_the_head_size_defaults_to_the_width_over_the_heads(copy):
    """Llama's config.json has no head_dim, or null."""
    directory, _ = copy
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for absent in ({k: v for k, v in config.items() if k != "head_dim"}, config | {"head_dim": None}):
        path.write_text(json.dumps(absent))
        assert load_model_config(directory)[0].head_size == SHAPE.width // SHAPE.heads


def test_tensors_are_checked_against_the_config(copy):
    directory, _ = copy
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 47}))
    with pytest.raises(UserError, match=r"model.embed_tokens.weight has shape \(48, 16\), expected \(47, 16\)"):
        load_policy(directory)
