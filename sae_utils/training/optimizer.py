"""Adam over an SAE's parameters, and dead latents begun anew."""

import torch
from torch import Tensor

from .streams import without_first

BY_LATENT = ("W_dec", "W_enc", "W_mag", "b_enc", "b_gate", "b_mag", "r_mag", "threshold")  # a subclass may have others


class Optimizer:
    """Fused Adam over an SAE's parameters, with what comes before and after its step.

    `leaves` are the parameters as they lie in memory: a transposed one (W_enc) Adam would copy back and forth in every step.
    What scales with x (`in_units_of_x`) is learnt in units of x_scale: its gradient is multiplied by x_scale before it is
    clipped and before Adam, and so is Adam's step. Then x and 256 x take the same steps.
    """

    def __init__(self, sae, betas: tuple[float, float]):
        sae.hold()
        self.sae, self.leaves = sae, {}
        for name, p in sae.named_parameters():
            self.leaves[name] = p if p.is_contiguous() else torch.nn.Parameter(p.detach().T, p.requires_grad)
        scaled = [self.leaves[name] for name in sae.in_units_of_x]
        others = [leaf for name, leaf in self.leaves.items() if name not in sae.in_units_of_x]
        self.adam = torch.optim.Adam([{"params": others}, {"params": scaled}], betas=betas, fused=True)

    def update(self, loss: Tensor, lr: float, x_scale: float, clip: float, check=lambda norm: None) -> None:
        """Backward, projection, clipping at a gradient norm, Adam, renormalisation.

        check: called with the gradient norm; what it raises leaves the parameters as they are.
        """
        parameters = list(self.sae.parameters())
        for p in parameters:
            p.grad = None
        loss.backward()
        self.sae.project_decoder_gradient()
        for name in self.sae.in_units_of_x:
            if (bias := self.sae.get_parameter(name)).grad is not None:
                bias.grad *= x_scale
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        check(norm)
        if norm.is_cuda or not norm <= clip:  # on a GPU asking costs more than multiplying by 1
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        for leaf, p in zip(self.leaves.values(), parameters):
            if leaf is not p and p.grad is not None:
                leaf.grad = p.grad.T
        weights, scaled = self.adam.param_groups
        weights["lr"], scaled["lr"] = lr, lr * x_scale
        self.sae.before_step()
        self.adam.step()
        self.sae.after_step()

    def state(self) -> dict[str, Tensor]:
        return {f"{name}/{k}": v for name, leaf in self.leaves.items() for k, v in self.adam.state[leaf].items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for key, value in state.items():
            name, k = key.split("/")
            self.adam.state[self.leaves[name]][k] = value.to(self.leaves[name].device)


@torch.no_grad()
def resample_dead(sae, x: Tensor, optimizer: Optimizer, generator: torch.Generator) -> None:
    """Let dead latents begin anew at inputs that are reconstructed badly (Bricken et al. 2023); live ones stay as they are.

    Inputs are drawn with probability ∝ (‖x − x̂‖²)², each for one latent at most; in whole rows position 0 is not drawn. W_dec
    gets the direction of x − b_dec, W_enc the same at 0.2 × the mean norm of the live, biases and Adam's moments become 0.
    What is frozen stays where it is, and a row of a frozen decoder is the direction that W_enc begins anew at. No random state
    but `generator` is touched.
    """
    rows, live = sae.rows(without_first(x)), ~sae.dead()
    dead = (~live).nonzero().squeeze(1)[: len(rows)]
    if not len(dead):
        return
    error = (rows - sae.eval()(rows).x_hat).square().sum(1).double()
    weight = (error / error.max().clamp_min(1e-30)).square().nan_to_num().cpu() + 1e-12  # never 0
    chosen = rows[torch.multinomial(weight, len(dead), generator=generator).to(rows.device)]
    directions = torch.nn.functional.normalize(chosen - sae.b_dec, dim=1)
    if "decoder" in sae.frozen:
        directions = sae.W_dec[dead]
    for name, parameter in sae.named_parameters():
        if name not in BY_LATENT or not parameter.requires_grad:
            continue
        new, leaf = directions if name == "W_dec" else 0, optimizer.leaves[name]
        if name in ("W_enc", "W_mag"):
            new = 0.2 * parameter.norm(dim=0)[live if live.any() else slice(None)].mean() * directions
        by_latent = 0 if name == "W_dec" or leaf is not parameter else -1  # the axis
        moments = [(m, 0) for m in optimizer.adam.state[leaf].values() if m.ndim]
        for tensor, value in [(leaf, new), *moments]:
            tensor.movedim(by_latent, 0)[dead] = value
    sae.revive(dead)
