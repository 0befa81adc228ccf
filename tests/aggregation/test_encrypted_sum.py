"""Ciphertexts of two sites, added without a secret key, open to the weighted mean."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import pytest
import torch
from encryption_cases import SCALE, SPEC, provisioned, update

from flap_nvflare.adapter.cipher import CIPHERTEXT, WEIGHT, Cipher, CipherError, make_keys
from flap_nvflare.aggregation import AggregationError, Contribution, aggregate, encrypted_sum
from flap_nvflare.aggregation.encrypted_sum import EncryptedSum

Sealed = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=[make_keys, provisioned], ids=["own", "FLARE's"])
def ends(request: pytest.FixtureRequest) -> tuple[Cipher, Cipher]:
    site, server = request.param()
    return Cipher(site), Cipher(server)


def test_the_sum_opens_to_the_rules_own_mean(ends: tuple[Cipher, Cipher]) -> None:
    site, server = ends
    assert site.opens
    assert not server.opens
    weights = {"A": 3.0, "B": 41.0, "C": 7.5}
    total = EncryptedSum(server, SPEC)
    for seed, (name, weight) in enumerate(weights.items()):
        total.add(Contribution(name, weight, site.seal(update(seed), SPEC, weight)))
    found = site.open(total.result().tensors, SPEC)
    plain = [Contribution(n, w, update(seed)) for seed, (n, w) in enumerate(weights.items())]
    expected = aggregate("mean", plain).tensors
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], tensor, rtol=3e-7, atol=2e-8)


def test_one_site_with_the_smallest_weight_comes_back_to_float32s_last_digits(
    ends: tuple[Cipher, Cipher],
) -> None:
    site, _ = ends
    found = site.open(site.seal(update(1), SPEC, 1.0), SPEC)
    for name, tensor in update(1).items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-7, atol=3e-7)


def test_the_order_of_arrival_does_not_change_a_byte(ends: tuple[Cipher, Cipher]) -> None:
    site, server = ends
    sealed = {name: site.seal(update(i), SPEC, i + 1.0) for i, name in enumerate("ABC")}
    results = []
    for order in ("ABC", "CAB", "BCA"):
        total = EncryptedSum(server, SPEC)
        for name in order:
            total.add(Contribution(name, "ABC".index(name) + 1.0, sealed[name]))
        results.append(total.result().tensors)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_the_server_can_neither_open_nor_seal(ends: tuple[Cipher, Cipher]) -> None:
    site, server = ends
    sealed = site.seal(update(0), SPEC, 1.0)
    with pytest.raises(CipherError, match="no secret key, so it can't open"):
        server.open(sealed, SPEC)
    with pytest.raises(CipherError, match="no secret key, so it can't seal"):
        server.seal(update(0), SPEC, 1.0)


def test_two_ciphertexts_of_the_same_update_share_nothing(ends: tuple[Cipher, Cipher]) -> None:
    one, two = (ends[0].seal(update(0), SPEC, 1.0)[CIPHERTEXT] for _ in range(2))
    assert (one == two).float().mean() < 0.05  # lengths, envelope, and one byte in 256


def test_another_key_does_not_open_it(ends: tuple[Cipher, Cipher]) -> None:
    other = Cipher(make_keys()[0])
    wrong = other.open(ends[0].seal(update(0), SPEC, 1.0), SPEC)
    # Numbers over the whole range: what a site's guard refuses by its norm.
    assert math.sqrt(sum(float(x.double().square().sum()) for x in wrong.values())) > 1e4


def changed(sealed: Sealed, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Sealed:
    return {**sealed, name: change(sealed[name].clone())}


def bytes_of(number: float) -> torch.Tensor:
    return torch.frombuffer(bytearray(struct.pack("<d", number)), dtype=torch.uint8)


HOSTILE: dict[str, Callable[[Sealed], object]] = {
    "found .'scan', 'sealed.ciphertext'., expected exactly": lambda sealed: {
        **sealed,
        "scan": torch.zeros(1),
    },
    "found <class 'list'>, expected exactly": lambda sealed: list(sealed),
    "no tensor of bytes": lambda sealed: changed(sealed, CIPHERTEXT, torch.Tensor.float),
    r"has shape \(1,": lambda sealed: changed(sealed, CIPHERTEXT, lambda x: x[:1]),
    "claims 18446744073709551615 bytes": lambda sealed: changed(
        sealed, CIPHERTEXT, lambda x: x.index_fill(1, torch.arange(8), 255)
    ),
    "piece 0: ": lambda sealed: changed(
        sealed, CIPHERTEXT, lambda x: x.index_fill(1, torch.arange(8, 200), 7)
    ),
    "piece 0 is not one": lambda sealed: changed(
        sealed, CIPHERTEXT, lambda x: x.index_fill(1, torch.arange(8), 0)
    ),
    "no positive number": lambda sealed: {**sealed, WEIGHT: bytes_of(math.nan)},
    r"sealed with weight 5.0, but sent with 2.0": lambda sealed: {**sealed, WEIGHT: bytes_of(5.0)},
}


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_no_sealed_update_is_refused_and_changes_nothing(
    text: str, ends: tuple[Cipher, Cipher]
) -> None:
    site, server = ends
    honest = site.seal(update(0), SPEC, 3.0)
    total = EncryptedSum(server, SPEC)
    total.add(Contribution("A", 3.0, honest))
    with pytest.raises(AggregationError, match=text):
        total.add(Contribution("F", 2.0, HOSTILE[text](site.seal(update(1), SPEC, 2.0))))
    result = total.result().tensors
    assert all(torch.equal(result[name], honest[name]) for name in honest)


def test_pieces_of_other_parameters_or_scale_are_refused(ends: tuple[Cipher, Cipher]) -> None:
    import tenseal as ts

    site, server = ends
    sealed = site.seal(update(0), SPEC, 1.0)
    other = ts.context(
        ts.SCHEME_TYPE.CKKS,
        poly_modulus_degree=8192,
        coeff_mod_bit_sizes=[50, 50],
        encryption_type=ts.ENCRYPTION_TYPE.SYMMETRIC,
    )
    numbers = [0.5] * server.slots
    strange = {
        "invalid": ts.ckks_vector(other, numbers, 2**40),
        "not one fresh": ts.ckks_vector(site._context, numbers, 2**30),
        "not one fresh ciphertext of 4096": ts.ckks_vector(site._context, numbers[:-1]),
    }
    for text, piece in strange.items():
        one = site.pack([piece] * site.pieces(SPEC), 1.0)
        with pytest.raises(AggregationError, match=text):
            EncryptedSum(server, SPEC).add(
                Contribution("F", 1.0, {**sealed, CIPHERTEXT: one[CIPHERTEXT]})
            )


def test_one_update_a_site_and_no_more_than_can_be_added(
    ends: tuple[Cipher, Cipher], monkeypatch: pytest.MonkeyPatch
) -> None:
    site, server = ends
    sealed = site.seal(update(0), SPEC, 1.0)
    total = EncryptedSum(server, SPEC)
    with pytest.raises(AggregationError, match="no update to aggregate"):
        total.result()
    total.add(Contribution("A", 1.0, sealed))
    with pytest.raises(AggregationError, match="'A' contributes twice"):
        total.add(Contribution("A", 1.0, sealed))
    monkeypatch.setattr(encrypted_sum, "MOST_SITES", 1)
    with pytest.raises(AggregationError, match="1 updates are the most"):
        total.add(Contribution("B", 1.0, sealed))


def test_values_that_would_leave_the_range_are_refused_before_they_are_sent(
    ends: tuple[Cipher, Cipher],
) -> None:
    site, _ = ends
    for value in (math.nan, math.inf, 1e6):
        with pytest.raises(CipherError, match="lower the learning rate"):
            site.seal({**update(0), SCALE: torch.tensor(value)}, SPEC, 100.0)
    with pytest.raises(CipherError, match="weight 0"):
        site.seal(update(0), SPEC, 0.0)
    with pytest.raises(CipherError, match=f"'{SCALE}' is missing"):
        site.seal({n: t for n, t in update(0).items() if n != SCALE}, SPEC, 1.0)


def test_the_largest_sum_of_the_most_sites_is_still_right(ends: tuple[Cipher, Cipher]) -> None:
    site, server = ends
    largest = server._largest / encrypted_sum.MOST_SITES * 1024
    plain = {name: torch.full(shape, largest) for name, shape in SPEC.shapes.items()}
    sealed = site.seal(plain, SPEC, 1.0)
    total = EncryptedSum(server, SPEC)
    for number in range(encrypted_sum.MOST_SITES):
        total.add(Contribution(str(number), 1.0, sealed))
    found = site.open(total.result().tensors, SPEC)
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=0.0)


def test_a_damaged_context_is_named() -> None:
    with pytest.raises(CipherError, match="no CKKS context"):
        Cipher(b"no context")
