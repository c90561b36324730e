"""The launch table: every row is well-formed and fits its card; how a row is found."""

import pytest
import torch

from tscale_kernels import launch_table

PRODUCTS = ("project", "expand", "add_normalise")
BYTES = {"int8": 1, "e4m3": 1, "any": 1, "bf16": 2}


def rows() -> list[tuple[str, str, str, dict[str, int]]]:
    return [
        (section, op, name, row)
        for section, ops in launch_table.table().items()
        for op, names in ops.items()
        for name, row in names.items()
    ]


def test_sections_and_rows_are_well_formed() -> None:
    assert set(launch_table.table()) == {f"sm_{arch}" for arch in launch_table.SHARED_MEMORY_BYTES} | {"all"}
    for section, op, name, row in rows():
        place = f"{section} {op} {name}"
        assert name in BYTES, place
        numbers = {key: value for key, value in row.items() if key != "note"}
        assert all(isinstance(value, int) and value > 0 for value in numbers.values()), place
        assert numbers["num_warps"] in (1, 2, 4, 8, 16) and numbers.get("num_stages", 1) < 8, place


def test_operand_buffers_of_products_fit_the_card() -> None:
    for section, op, name, row in rows():
        if section != "all" and {"BR", "BC", "BK"} <= set(row):
            operands = (row["BR"] + row["BC"]) * row["BK"] * BYTES[name] * row["num_stages"]
            assert operands <= launch_table.SHARED_MEMORY_BYTES[int(section[3:])], f"{section} {op} {name}"


@pytest.mark.parametrize("op", PRODUCTS)
def test_every_card_has_rows_for_the_dtypes_it_can_multiply(op: str) -> None:
    for arch in launch_table.SHARED_MEMORY_BYTES:
        capability = divmod(arch, 10)
        for code in launch_table.CODE_NAMES:
            if code == torch.float8_e4m3fn and arch < 89:
                with pytest.raises(KeyError, match=f"no row for {op} of e4m3 on sm_{arch}"):
                    launch_table.launch(op, capability, code)
            else:
                assert launch_table.launch(op, capability, code)["BC"] % 128 == 0


def test_unknown_cards_use_the_newest_older_section_and_too_old_ones_are_named() -> None:
    found = [launch_table.architecture(card) for card in ((8, 0), (8, 7), (8, 9), (9, 0), (10, 3), (12, 1))]
    assert found == [80, 86, 89, 90, 100, 120]
    with pytest.raises(ValueError, match="7.5"):
        launch_table.architecture((7, 5))


def test_a_launch_is_a_fresh_dict_without_the_note() -> None:
    first = launch_table.launch("project", (9, 0), torch.int8)
    assert "note" not in first
    first["BR"] = 0
    assert launch_table.launch("project", (9, 0), torch.int8)["BR"] > 0


def test_blocks_are_halved_until_they_divide() -> None:
    assert launch_table.fitted({"BR": 256, "BC": 256, "BK": 64}, BR=384, BC=512) == {"BR": 128, "BC": 256, "BK": 64}
