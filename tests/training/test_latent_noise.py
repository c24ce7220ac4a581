"""Noise on a layer's states: its mean and spread by hand, its places, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from tiny_models import base_model, generator
from torch import Tensor

from alignx_ds.data.batches import IGNORED, MicroBatch, collate, pack
from alignx_ds.data.encode import Example
from alignx_ds.evaluation.decode import Decoder
from alignx_ds.evaluation.likelihood import log_probabilities
from alignx_ds.stages.activations import recompute
from alignx_ds.training.latent_noise import before_answers, matched, noisy_language_loss, perturbed
from alignx_ds.training.losses import language_loss

LAYER, BELOW = 1, 0
ENDS: list[int] = []  # no token ends an answer


def test_noise_has_the_mean_and_the_spread_of_each_state() -> None:
    """Mean 2 and standard deviation 1 become 4 and 2, and −10 and 30."""
    noise = torch.tensor([[3.0, 1.0, 2.0]])
    states = torch.tensor([[[2.0, 4.0, 6.0], [-40.0, -10.0, 20.0]]])
    expected = torch.tensor([[[6.0, 2.0, 4.0], [20.0, -40.0, -10.0]]])
    torch.testing.assert_close(matched(noise, states), expected)


def entering(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """The states that go into the layer above LAYER."""
    found: list[Tensor] = []
    hook = model.get_submodule(f"model.layers.{LAYER + 1}").register_forward_pre_hook(
        lambda module, inputs: found.append(inputs[0])
    )
    with torch.no_grad():
        model(ids)
    hook.remove()
    return found[0]


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_only_the_named_tokens_are_changed_and_all_is_as_before_afterwards(strength: float) -> None:
    model, ids = base_model(), torch.tensor([[5, 6, 7, 8]])
    noise, places = (
        torch.randn(1, 1, model.config.hidden_size, generator=generator(1)),
        torch.tensor([[0, 1, 1, 0]]) > 0,
    )
    before = entering(model, ids)
    with perturbed(model.model.layers[LAYER], noise, places, strength):
        during = entering(model, ids)
    expected = before + strength * matched(noise, before) * places[..., None]
    torch.testing.assert_close(during, expected)
    assert torch.equal(entering(model, ids), before)


def test_no_gradient_goes_through_the_noise() -> None:
    """So a layer that is computed again for the backward pass, without the noise, has the same gradients."""
    layer, states = torch.nn.Identity(), torch.randn(1, 2, 8, generator=generator(2), requires_grad=True)
    with perturbed(layer, torch.randn(1, 1, 8, generator=generator(3)), torch.tensor([[True, False]])):
        layer(states).sum().backward()
    assert states.grad is not None and torch.equal(states.grad, torch.ones_like(states))


def test_the_tokens_before_answers_are_those_that_predict_a_label() -> None:
    labels = torch.tensor([[IGNORED, IGNORED, 7, 8], [IGNORED, 5, IGNORED, IGNORED]])
    assert before_answers(labels).tolist() == [[False, True, True, False], [True, False, False, False]]


def test_decoding_and_scoring_perturb_the_same_states() -> None:
    """The answer decoded under noise is the likeliest, token by token, when it is scored under the same noise."""
    model, prompts, limit = base_model(), [(5, 6, 7), (9, 10, 11)], 5
    noise = torch.randn(2, 1, model.config.hidden_size, generator=generator(4))
    ids, layer = torch.tensor(prompts), model.model.layers[BELOW]
    plain = Decoder(model).greedy(ids, torch.ones_like(ids), limit, ENDS, 0)
    with perturbed(layer, noise):
        said = Decoder(model).greedy(ids, torch.ones_like(ids), limit, ENDS, 0)
    assert not torch.equal(said, plain)
    examples = [Example((*prompt, *answer), len(prompt)) for prompt, answer in zip(prompts, said.tolist(), strict=True)]
    batch = collate(examples, pad_id=0)
    with perturbed(layer, noise, before_answers(batch.labels)), torch.no_grad():
        logits = model(batch.input_ids).logits
        found = log_probabilities(model, batch)
    after = logits[:, len(prompts[0]) - 1 : -1]
    assert torch.equal(after.argmax(-1), said)
    torch.testing.assert_close(found, after.log_softmax(-1).amax(-1).sum(-1).double())


def test_layers_that_recompute_their_activations_have_the_same_gradients() -> None:
    part = MicroBatch(pack([Example((5, 6, 7, 8), 2)], pad_id=0), torch.zeros(1), torch.zeros(1, 1), 1.0)

    def gradients(*, recomputed: bool) -> list[Tensor]:
        model = base_model().train()
        if recomputed:
            recompute(model)
        torch.manual_seed(0)
        noisy_language_loss([model.model.layers[LAYER]], model, part).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    torch.testing.assert_close(gradients(recomputed=True), gradients(recomputed=False))


def test_a_noisy_step_is_the_loss_under_noise_on_one_of_the_layers() -> None:
    """Of packed rows; each micro batch draws its layer and its noise from torch's generator."""
    model, examples = base_model(), [Example((5, 6, 7, 8), 2), Example((9, 10, 11), 1)]
    layers = list(model.model.layers)
    part = MicroBatch(pack(examples, pad_id=0), torch.zeros(2), torch.zeros(2, 1), 0.5)
    places = before_answers(part.batch.labels)
    for seed in range(4):
        torch.manual_seed(seed)
        found = noisy_language_loss(layers, model, part).loss
        torch.manual_seed(seed)
        layer = int(torch.randint(len(layers), ()))
        noise = torch.randn(*part.batch.input_ids.shape, model.config.hidden_size)
        with perturbed(layers[layer], noise, places):
            expected = language_loss(model, part).loss
        torch.testing.assert_close(found, expected)
        assert not torch.isclose(found, language_loss(model, part).loss)
