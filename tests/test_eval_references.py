"""Choice of references: properties that hold for every dataset."""

from __future__ import annotations

import random
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from icm_cli.datasets.groups import Sample, group_samples
from icm_cli.evaluation.rounds import choose_references, select_targets

names = st.lists(st.text("abcü/_0123", min_size=1, max_size=6), min_size=1, max_size=9, unique=True)


def sample(name: str, group: str = "g", image: str | None = None) -> Sample:
    return Sample(name, Path(image or f"{name}.jpg"), Path(f"{name}.png"), group=group)


@given(names, st.integers(1, 12), st.integers(1, 5), st.randoms())
def test_choice_does_not_depend_on_order_and_never_includes_targets(
    group: list[str], rounds: int, refs_per_group: int, shuffler: random.Random
) -> None:
    samples = [sample(name) for name in group]
    options = {"rounds": rounds, "refs_per_group": refs_per_group, "is_usable": lambda _: True}
    chosen, problems = choose_references(group_samples(samples), **options)  # type: ignore[arg-type]
    shuffler.shuffle(samples)
    assert choose_references(group_samples(samples), **options)[0] == chosen  # type: ignore[arg-type]
    assert len(chosen) == rounds
    if len(group) == 1:
        assert [problem.kind for problem in problems] == ["lone-image"]
        assert chosen == [{}] * rounds
        return
    assert problems == []
    for references in chosen:
        assert len(set(references["g"])) == len(references["g"]) == min(refs_per_group, len(group) - 1)
        left = {each.name for each in select_targets(samples, references["g"])}
        assert left == set(group) - set(references["g"])
        assert left
    firsts = [references["g"][0] for references in chosen]
    assert len(set(firsts)) == min(rounds, len(group))


@given(names.filter(lambda group: len(group) > 2), st.data())
def test_unusable_samples_are_never_chosen(group: list[str], data: st.DataObject) -> None:
    bad = data.draw(st.sets(st.sampled_from(group)))
    chosen, _ = choose_references(
        {"g": [sample(name) for name in group]},
        rounds=3,
        refs_per_group=2,
        is_usable=lambda name: name not in bad,
    )
    for references in chosen:
        assert not bad & set(references.get("g", []))
        assert ("g" in references) == (bad != set(group))


def test_other_alphas_of_a_reference_image_are_no_targets() -> None:
    samples = [sample("street_0", image="street.jpg"), sample("street_1", image="street.jpg"), sample("park_0")]
    assert [each.name for each in select_targets(samples, ["street_1"])] == ["park_0"]
    _, problems = choose_references({"g": samples[:2]}, rounds=1, refs_per_group=1, is_usable=lambda _: True)
    assert [problem.kind for problem in problems] == ["lone-image", "lone-image"]


def test_one_image_remains_as_a_target_if_images_have_several_samples() -> None:
    samples = [sample("street_0", image="street.jpg"), sample("street_1", image="street.jpg"), sample("park_0")]
    chosen, problems = choose_references({"g": samples}, rounds=3, refs_per_group=2, is_usable=lambda _: True)
    assert problems == []
    assert all(select_targets(samples, references["g"]) for references in chosen)
