"""The tables of cases hold what they promise: awkward shapes for the tests, and the shapes of well-known workloads."""

from __future__ import annotations

import json
import re

import pytest
import torch

from gencore.bench import cases
from gencore.bench.cases import AttentionCase, Case

TABLES = {
    name: getattr(cases, name)
    for name in (
        "NOISE",
        "REPARAMETERIZE",
        "DIFFUSION",
        "GROUP_NORM",
        "ATTENTION",
        "SPATIAL_ATTENTION",
        "NETWORKS",
        "TRAINING",
        "SAMPLING",
    )
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
def test_every_case_is_one_of_a_kind_and_used(table):
    assert len({str(case) for case in table}) == len(table)
    used = {case for case in table if case.timed or case.presets}
    assert set(cases.small(table)) | used == set(table)
    assert {preset for case in table for preset in case.presets} <= cases.PRESETS.keys()


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
def test_a_shrunk_case_is_small_and_of_the_same_kind(table):
    for case in table:
        shrunk = case.shrunk()
        assert type(shrunk) is type(case)
        assert shrunk.elements <= 1 << 15
        assert shrunk.layout == case.layout


def test_tests_run_no_case_that_is_a_presets_alone():
    for table in TABLES.values():
        assert all(case.timed or not case.presets for case in cases.small(table))


@pytest.mark.parametrize("table", [cases.NOISE, cases.REPARAMETERIZE])
def test_the_tables_have_the_awkward_ones(table):
    shapes = [case.shape for case in cases.small(table)]
    assert any(0 in shape for shape in shapes)
    assert any(case.elements == 1 for case in table)
    assert any(case.elements % 4 for case in table)
    assert {case.layout for case in cases.small(table)} == {"contiguous", "channels_last", "channels_last_3d"}


def test_attention_has_the_awkward_ones():
    small = cases.small(cases.ATTENTION)
    assert {0, 1, 17, 33, 77, 130} <= {case.keys for case in small}
    assert {1, 8, 20, 32, 40, 64, 80, 128, 160, 512} <= {case.size for case in small}
    assert any(case.queries > case.keys > 0 for case in small)
    assert any(case.keys > case.queries > 1 for case in small)
    assert {case.layout for case in small} == {"heads", "tokens"}
    assert {case.layout for case in cases.small(cases.SPATIAL_ATTENTION)} == {"contiguous", "channels_last"}


def test_a_case_makes_its_layout():
    for case in cases.NOISE:
        assert torch.empty(case.shape, device="meta").to(memory_format=case.memory_format).shape == case.shape


def test_a_case_of_attention_makes_its_tensors():
    for case in cases.ATTENTION:
        q, k, v = case.tensors(torch.float32, "meta")
        assert q.shape == (case.batch, case.heads, case.queries, case.size)
        assert k.shape == v.shape == (case.batch, case.heads, case.keys, case.size)
        assert case.layout == "heads" or q.stride(3) == k.stride(3) == 1
        assert q.is_contiguous() or case.layout == "tokens"
    for case in cases.SPATIAL_ATTENTION:
        (image,) = case.tensors(torch.float32, "meta")
        assert image.shape[:2] == (case.batch, 3 * case.heads * case.size)
        assert image.shape[2:].numel() == case.queries == case.keys
        assert image.is_contiguous(memory_format=case.memory_format)


def test_a_generator_makes_the_same_numbers_again():
    for case in cases.small(cases.ATTENTION):
        once, again = (case.tensors(torch.float32, "cpu", torch.Generator().manual_seed(1)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def layers_of(preset):
    """What a preset's networks give their norms and attention, by diffusers, on tensors without memory.

    Norms are (batch, channels, pixels), attention (batch, heads, queries, keys, size).
    """
    diffusers = pytest.importorskip("diffusers")
    from gencore.bench.suite import networks

    norms, attention = set(), set()

    def of_norm(module, args):
        norms.add((*args[0].shape[:2], args[0].shape[2:].numel()))

    def of_attention(module, args, options):
        hidden = args[0] if args else options["hidden_states"]
        tokens = hidden.shape[1] if hidden.dim() == 3 else hidden.shape[2:].numel()
        context = options.get("encoder_hidden_states")
        keys = tokens if context is None else context.shape[1]
        attention.add((len(hidden), module.heads, tokens, keys, module.to_q.out_features // module.heads))

    def run(model, *args):
        for module in model.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.register_forward_pre_hook(of_norm)
            elif type(module).__name__ == "Attention":
                module.register_forward_pre_hook(of_attention, with_kwargs=True)
        model(*args)

    with torch.device("meta"):
        if preset == "ddpm-cifar10":
            run(diffusers.UNet2DModel(**networks.CIFAR10), torch.empty(128, 3, 32, 32), torch.ones(128))
            return norms, attention
        if preset == "sd15":
            size, unet = 64, diffusers.UNet2DConditionModel(**networks.STABLE_DIFFUSION)
        else:
            # stabilityai/stable-diffusion-xl-base-1.0, but for its embedding of sizes, and with one layer in place of
            # up to ten that are given the same.
            size, unet = (
                128,
                diffusers.UNet2DConditionModel(
                    block_out_channels=(320, 640, 1280),
                    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                    attention_head_dim=(5, 10, 20),
                    cross_attention_dim=2048,
                ),
            )
        context = torch.empty(2, 77, unet.config.cross_attention_dim)
        run(unet, torch.empty(2, 4, size, size), torch.ones(2), context)
        autoencoder = diffusers.AutoencoderKL(**networks.AUTOENCODER)
        run(autoencoder.encoder, torch.empty(1, 3, 8 * size, 8 * size))
        run(autoencoder.decoder, torch.empty(1, 4, size, size))
    return norms, attention


@pytest.mark.parametrize("preset", ["sd15", "sdxl", "ddpm-cifar10"])
def test_a_preset_has_the_layers_of_its_networks(preset):
    norms, attention = layers_of(preset)
    for layout in ("contiguous", "channels_last"):
        of_preset = [case for case in cases.GROUP_NORM if preset in case.presets and case.layout == layout]
        # Attention's own norms see the pixels in a row.
        assert {(*case.shape[:2], case.shape[2] * case.shape[3]) for case in of_preset} == norms
        assert {case.groups for case in of_preset} == {32}
    found = {
        (case.batch, case.heads, case.queries, case.keys, case.size)
        for case in cases.ATTENTION + cases.SPATIAL_ATTENTION
        if preset in case.presets
    }
    assert found == attention


def test_every_preset_is_of_some_ops_and_has_its_latents():
    for preset, what in cases.PRESETS.items():
        assert what
        assert any(preset in case.presets for table in TABLES.values() for case in table)
    for preset, shape in (("sd15", (1, 4, 64, 64)), ("sdxl", (1, 4, 128, 128)), ("ddpm-cifar10", (128, 3, 32, 32))):
        assert [case.shape for case in cases.DIFFUSION if preset in case.presets] == [shape]
    assert {case.draws for case in cases.REPARAMETERIZE if "mnist-vae" in case.presets} == {None, 10}


def table_of(tmp_path, told):
    path = tmp_path / "cases.json"
    path.write_text(told if isinstance(told, str) else json.dumps(told))
    return cases.read_table(path)


def test_a_table_of_the_users_own_is_read(tmp_path):
    table = table_of(
        tmp_path,
        {
            "group_norm": [{"shape": [2, 320, 64, 64], "groups": 32, "layout": "channels_last", "why": "ours"}],
            "attention": [
                {"batch": 1, "heads": 8, "queries": 4096, "keys": 77, "size": 40, "layout": "tokens"},
                {"batch": 2, "heads": 1, "queries": 64, "size": 8, "layout": "contiguous"},
            ],
            "reparameterize": [{"shape": [128, 20], "draws": 3}],
        },
    )
    (norm,) = table.of("group_norm")
    assert norm == Case((2, 320, 64, 64), "ours", layout="channels_last", groups=32)
    cross, image = table.of("attention")
    assert cross == AttentionCase(1, 8, 4096, 77, 40, cross.why, layout="tokens")
    assert (image.queries, image.keys, image.layout) == (64, 64, "contiguous")
    assert table.of("reparameterize")[0].draws == 3
    assert table.of("normal") == ()


GOOD = {"shape": [2, 4, 8, 8], "groups": 2}
HEADS = {"batch": 1, "heads": 2, "queries": 8, "size": 4}


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("{", "is no JSON"),
        ([], "must be an object of lists of cases by op, got an empty list"),
        ({"norm": [GOOD]}, "op must be one of normal, .*, got 'norm'"),
        ({"group_norm": GOOD}, "group_norm must be a list of cases, got dict"),
        ({"group_norm": []}, "group_norm must be a list of cases, got an empty list"),
        ({"group_norm": [GOOD, 3]}, r"group_norm\[1\] must be an object, got int"),
        ({"group_norm": [GOOD, GOOD]}, "every case once only"),
        ({"group_norm": [{**GOOD, "size": 3}]}, r"group_norm\[0\] has an unknown key 'size'; there are shape, groups"),
        ({"normal": [GOOD]}, "unknown key 'groups'"),
        ({"group_norm": [{"shape": [2, 4, 8, 8]}]}, "groups is missing; it must be an integer of at least 1"),
        ({"group_norm": [{**GOOD, "groups": 3}]}, "groups must be a divisor of the 4 channels, got 3"),
        ({"group_norm": [{**GOOD, "groups": True}]}, "groups must be an integer of at least 1, got True"),
        ({"group_norm": [{**GOOD, "shape": [2, 4]}]}, "shape must be at least 3 sizes"),
        ({"normal": [{"shape": [2, 0]}]}, r"shape must be a list of integers of at least 1, got \[2, 0\]"),
        ({"normal": [{"shape": 2}]}, "shape must be a list of integers of at least 1, got 2"),
        ({"normal": [{"shape": [2, 4], "layout": "channels_last"}]}, "contiguous for a shape of 2 sizes"),
        ({"normal": [{"shape": [2, 4], "layout": "tokens"}]}, "layout must be one of contiguous, channels_last,"),
        ({"normal": [{"shape": [2, 4], "layout": 3}]}, "layout must be one of contiguous, .*, got 3"),
        ({"normal": [{"shape": [2, 4], "why": 3}]}, "why must be a text, got 3"),
        ({"attention": [{**HEADS, "layout": "channels_last_3d"}]}, "layout must be one of heads, tokens"),
        ({"attention": [{**HEADS, "keys": 9, "layout": "contiguous"}]}, "keys must be queries, 8, in images, got 9"),
        ({"attention": [{**HEADS, "heads": "2"}]}, "heads must be an integer of at least 1, got '2'"),
        ({"attention": [{"batch": 1}]}, "heads is missing"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path, told, message):
    with pytest.raises(cases.CasesError, match=message):
        table_of(tmp_path, told)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(cases.CasesError, match=re.escape(f"{tmp_path / 'none.json'} cannot be read")):
        cases.read_table(tmp_path / "none.json")
