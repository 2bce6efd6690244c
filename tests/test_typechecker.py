"""The checker that holds every call to its types lets nothing through that it should not."""

import dataclasses

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor
from typechecker import checked


@checked(typechecker=None)
def outer(x: Float[Tensor, "a"], y: Float[Tensor, "b"], cut: int = 0) -> Float[Tensor, "a b"]:
    product = x[:, None] * y
    return product[cut:] if cut < 9 else product.long()


def test_every_kind_of_call_is_looked_at_however_many_went_well_before():
    two, three = torch.ones(2), torch.ones(3)
    for _ in range(3):
        assert outer(two, three).shape == (2, 3)
        assert outer(three, two, cut=0).shape == (3, 2)
        for wrong in ((two[None], three), (two.long(), three), (two, [three]), (two, three, "0")):
            with pytest.raises(TypeCheckError, match="the parameters"):
                outer(*wrong)


def test_what_comes_back_is_looked_at_although_what_went_in_is_known():
    two, three = torch.ones(2), torch.ones(3)
    for _ in range(3):
        assert outer(two, three, 0).shape == (2, 3)
        for cut in 1, 9:
            with pytest.raises(TypeCheckError, match="the return value"):
                outer(two, three, cut)


def test_a_shape_may_name_a_number_that_was_given():
    @checked(typechecker=None)
    def zeros(rows: int, said: int) -> Float[Tensor, "{rows} 3"]:
        return torch.zeros(said, 3)

    for _ in range(2):
        assert len(zeros(2, 2)) == 2 and len(zeros(5, 5)) == 5
        for rows, said in ((5, 2), (2, 5)):
            with pytest.raises(TypeCheckError, match="the return value"):
                zeros(rows, said)


@checked(typechecker=None)
@dataclasses.dataclass
class Pair:
    one: Float[Tensor, "a"]
    other: Float[Tensor, "a"]

    @classmethod
    @checked
    def twice(cls, x: Tensor) -> "Pair":
        return cls(x, x)

    @property
    @checked
    def size(self) -> int:
        return self.one.shape[0]


def test_classes_containers_and_functions_without_shapes_are_held_too(monkeypatch):
    two, three = torch.ones(2), torch.ones(3)
    assert Pair.twice(two).size == 2
    with pytest.raises(TypeCheckError):
        Pair(two, three)
    with pytest.raises(TypeCheckError):
        Pair.twice("two")

    @checked(typechecker=None)
    def total(rows: tuple[Float[Tensor, "a"], Float[Tensor, "a"]], scale: float = 1.0) -> Tensor:
        return torch.stack(rows).sum() * scale

    assert total((two, two), 2) == 8
    with pytest.raises(TypeCheckError):
        total((two, three))
    with pytest.raises(TypeCheckError):
        total((two, two), "2")
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    assert total((two, two), True) == 4 and Pair(two, three).size == 2
