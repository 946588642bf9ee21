"""What an SAE leaves unexplained (arXiv 2410.14670).

Probes predict the error e = x − x̂ from x by least squares, and split it into a linear and a nonlinear part; beside them stand
the controls, which are ours: what any least-squares decoder implies, Gaussian data, an untrained model. `sae_utils.world` has data
where every part of the error is known; how much is the encoder's fault, `sae_utils.pursuit` says.

Probes read streams: an iterable, gone through more than once, of dicts with `x` [n, d_in] and `row` [n], the context of each token.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .lm import load_language_model, run_prefix, run_spliced, token_loss
from .sae import SAEOutput, inference, measuring
from .sparse import sparse_decode

# ---------------------------------------------------------------------------------------------------------------------
# Least squares from sums
# ---------------------------------------------------------------------------------------------------------------------

ROWS_PER_INPUT = 40


@dataclass
class Linear:
    """u → u W + c; W [d_u, d_v], c [d_v]."""

    W: Tensor
    c: Tensor

    def __call__(self, u: Tensor) -> Tensor:
        return u @ self.W.to(u.dtype) + self.c.to(u.dtype)


class Moments:
    """Sums in fp64 over tokens of (u, v), from which v is regressed on u; memory does not grow with tokens.

    joint: keep Σ vᵀv as well, which `identity` reads. of: Moments of the same u with another v, for Σ uᵀu, which is most of the work.
    """

    def __init__(self, joint: bool = False, of: "Moments | None" = None):
        if joint and of:
            raise ValueError("Moments: joint=True keeps all sums, so there is nothing to take from those of `of`")
        self.n, self.joint, self.of, self.sums = 0, joint, of, None

    def add(self, u: Tensor, v: Tensor) -> None:
        """u [n, d_u], v [n, d_v]."""
        for part_u, part_v in zip(u.split(2048), v.split(2048)):
            both = torch.cat([part_u.double(), part_v.double()], 1)
            left = both if self.joint else both[:, : u.shape[1]]
            now = [both.sum(0), left.T @ (both[:, u.shape[1] :] if self.of else both)]
            self.sums = now if self.sums is None else [a.add_(b) for a, b in zip(self.sums, now)]
        self.n, self.d_u = self.n + len(u), u.shape[1]

    def covariance(self) -> tuple[Tensor, Tensor]:
        """Mean [d_u + d_v] and covariance over n of (u, v): its rows of u alone, or all if joint."""
        mean = self.sums[0] / self.n
        gram = (torch.cat([self.of.sums[1][:, : self.d_u], self.sums[1]], 1) if self.of else self.sums[1]) / self.n
        return mean, gram - mean[: len(gram), None] * mean

    def fit(self, rows_per_input: int = ROWS_PER_INPUT) -> Linear:
        """argmin E‖u W + c − v‖². Raises ValueError if there are fewer than rows_per_input · d_u tokens."""
        d, need = self.d_u if self.n else 0, rows_per_input * (self.d_u if self.n else 1)
        if self.n < need:
            raise ValueError(
                f"{self.n:,} tokens to fit a probe of {d} inputs on: it wants at least {rows_per_input} for each input. "
                f"Harvest {need:,} fitting tokens or more (and as many again, in other contexts, for the test)"
            )
        mean, cov = self.covariance()
        W = solve(cov[:d, :d], cov[:d, d:])
        return Linear(W, mean[d:] - mean[:d] @ W)


def solve(A: Tensor, B: Tensor) -> Tensor:
    """A⁻¹ B for a covariance A; directions without variance (1e-12 of the largest) take no part."""
    values, vectors = torch.linalg.eigh(A)
    inverse = torch.where(values > 1e-12 * values[-1].clamp_min(1e-300), 1 / values, 0)
    return vectors @ (inverse[:, None] * (vectors.T @ B))


class Scores:
    """R² = 1 − Σ‖v − prediction‖² / Σ‖v − v̄‖² of held-out tokens, from sums kept for every context.

    Pooled: both sums over coordinates as well, so that coordinates with much variance count for more.
    """

    def __init__(self):
        self.contexts = self.coordinates = None  # [n_contexts, 3 + d]: n, ‖residual‖², ‖v‖², v; [2, d]: residual², v²

    def add(self, v: Tensor, residual: Tensor, context: Tensor) -> None:
        """v and residual = v − prediction [n, d], context [n] whole numbers ≥ 0."""
        v, residual = v.double(), residual.double()
        squares = torch.stack([residual.square().sum(0), v.square().sum(0)])
        self.coordinates = squares if self.coordinates is None else self.coordinates + squares
        size, old = int(context.max()) + 1, self.contexts
        if old is None or len(old) < size:
            self.contexts = v.new_zeros(size, 3 + v.shape[1])
            if old is not None:
                self.contexts[: len(old)] = old
        about = [v.new_ones(len(v), 1), residual.square().sum(1, keepdim=True), v.square().sum(1, keepdim=True), v]
        self.contexts.index_add_(0, context, torch.cat(about, 1))

    def r2(self) -> float:
        return float(self.unexplained(torch.ones(1, len(self.contexts)).to(self.contexts)).neg().add(1))

    def per_coordinate(self) -> Tensor:
        """R² of every coordinate, [d]; NaN for one without variance."""
        total = self.contexts.sum(0)
        return 1 - self.coordinates[0] / (self.coordinates[1] - total[3:].square() / total[0])

    def draws(self, n: int = 1000, seed: int = 0) -> Tensor:
        """1 − R² [1 + n]: of all contexts, then with contexts drawn again (bootstrap; the probe stays).

        Scores of the same contexts draw the same ones for equal seeds, so that differences and ratios of them are paired.
        """
        used = self.contexts[self.contexts[:, 0] > 0]
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(used), (n, len(used)), generator=generator).to(used.device)
        weights = torch.zeros(n, len(used), dtype=torch.double, device=used.device)
        weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.double))
        return self.unexplained(torch.cat([torch.ones_like(weights[:1]), weights]), used).cpu()

    def interval(self, n: int = 1000, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
        """Bootstrap interval of R²."""
        return tuple(with_interval(1 - self.draws(n, seed), level)[1:])

    def unexplained(self, weights: Tensor, contexts: Tensor | None = None) -> Tensor:
        total = weights @ (self.contexts if contexts is None else contexts)
        return total[:, 1] / (total[:, 2] - total[:, 3:].square().sum(1) / total[:, 0])


def with_interval(draws: Tensor, level: float = 0.95) -> list[float]:
    """[value, low, high] of bootstrap draws [1 + n], of which the first is the value."""
    quantiles = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=draws.dtype)
    return [float(draws[0]), *draws[1:].quantile(quantiles).tolist()]


def power_law(sizes, scores: list[Scores]) -> Tensor:
    """b of 1 − R² ∝ size^b by least squares of logarithms, [1 + n]: of all contexts, then of draws (`Scores.draws`)."""
    log_size = torch.tensor(list(sizes), dtype=torch.double).log()
    log_size = log_size - log_size.mean()
    log_left = torch.stack([score.draws().clamp_min(1e-30).log() for score in scores])
    return log_size @ log_left / log_size.square().sum()


def verdict(value: list[float], within: tuple[float, float], control: float, name: str = "") -> dict:
    """Whether a claim is true here: its value's interval [value, low, high] lies in a range, or outside, or reaches over an end of it.

    If a control, which knows nothing of what the claim is about, is in the range as well, the claim holds and is no evidence.
    """
    (v, low, high), (at_least, at_most) = value, within
    if not low <= high or high < at_least or low > at_most:
        says = "undecided" if not low <= high else "does not hold here"
    elif low < at_least or high > at_most:
        says = "undecided"
    else:
        says = f"holds, and {'in' if at_least <= control <= at_most else 'not in'} the control"
    numbers = {"here": v, "low": low, "high": high, "range": list(within), "control": control}
    return numbers | {"control is": name, "verdict": says}


class Contexts:
    """A stream over whole rows of an ActivationStore without the first `skip` of each context (ours: a fifth)."""

    def __init__(self, store, rows, skip: float = 0.2, batch_rows: int = 64):
        self.store, self.rows, self.batch_rows = store, np.asarray(rows), batch_rows
        self.first = max(int(skip * store.n_ctx), store.skip)

    def __iter__(self):
        for i in range(0, len(self.rows), self.batch_rows):
            batch = self.store.take_rows(self.rows[i : i + self.batch_rows])
            n, shape = len(batch["row"]), (len(batch["row"]), self.store.n_ctx - self.first)
            about = {
                "row": batch["row"][:, None].expand(shape),
                "position": batch["position"][self.first :].expand(shape),
            }
            keep = {
                key: value[:, self.first :] for key, value in batch.items() if value.shape[:2] == (n, self.store.n_ctx)
            }
            yield {key: value.flatten(0, 1) for key, value in (keep | about).items()}


def in_batches(x: Tensor, n_ctx: int = 256, size: int = 8192) -> list[dict]:
    """A tensor [n, d_in] as a stream; every n_ctx tokens count as a context."""
    row = torch.arange(len(x), device=x.device) // n_ctx
    return [{"x": part, "row": at} for part, at in zip(x.split(size), row.split(size))]


# ---------------------------------------------------------------------------------------------------------------------
# The error, split
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class ErrorSplit:
    """What `split_error` finds; R² and FVU on the test stream."""

    vector: Linear  # x → e
    norm: Linear  # x → ‖e‖²
    scores: dict[str, Scores]
    norms: dict[str, Tensor]  # of every test token: "error", "nonlinear" [n]

    def nonlinear(self, x: Tensor, error: Tensor) -> Tensor:
        """e − LinearError(x)."""
        return error - self.vector(x)

    def summary(self) -> dict[str, float | list[float]]:
        """r2: of e from x; r2_norm_*: of five squared norms from x; fvu, fvu_nonlinear; each r2_* with `_interval`.

        fvu_bound = FVU (1 − FVU), and r2 ≥ FVU, hold at a decoder that is optimal for its latents.
        """
        values = {"fvu": 1 - self.scores["fvu"].r2(), "fvu_nonlinear": 1 - self.scores["fvu_nonlinear"].r2()}
        values["fvu_bound"] = values["fvu"] * (1 - values["fvu"])
        values["r2_per_coordinate"] = float(self.scores["r2"].per_coordinate().nanmean())
        for name in self.scores.keys() - {"fvu", "fvu_nonlinear"}:
            values |= {name: self.scores[name].r2(), f"{name}_interval": list(self.scores[name].interval())}
        return values


def slices(stream, size: int = 2048):
    """The stream in slices so small that what is computed of them in fp64 takes no memory to speak of."""
    for batch in stream:
        for i in range(0, len(batch["x"]), size):
            yield {key: value[i : i + size] for key, value in batch.items()}


FIVE = ("x", "x_hat", "error", "linear", "nonlinear")


@measuring
def split_error(sae, fit, test, rows_per_input: int = ROWS_PER_INPUT) -> ErrorSplit:
    """Probe the error of an SAE (arXiv 2410.14670): fitted on one stream, scored on another, of other contexts.

    b* = argmin E‖x b + c − e‖², LinearError = x b* + c, NonlinearError = e − LinearError; a* = argmin E(aᵀx + c − ‖e‖²)².
    The norm probe is fitted to the squared norms of all of `FIVE`. FVU_nonlinear = 1 − R²(x, x̂ + LinearError), pooled.
    `sae`: any callable x → object with x_hat. Raises ValueError for fewer than 40 · d_in fitting tokens, and where a context is
    in both streams.
    """
    moments, seen = Moments(), set()
    for batch in slices(fit):
        moments.add(batch["x"], batch["x"] - sae(batch["x"]).x_hat)
        seen |= set(batch["row"].unique().tolist())
    vector = moments.fit(rows_per_input)

    def five(x):
        x_hat = sae(x).x_hat
        linear = vector(x)
        return dict(zip(FIVE, (x, x_hat, x - x_hat, linear, x - x_hat - linear)))

    def squares(parts):
        return torch.stack([part.double().square().sum(1) for part in parts.values()], 1)

    norm_moments = Moments(of=moments)
    for batch in slices(fit):
        norm_moments.add(batch["x"], squares(five(batch["x"])))
    norm = norm_moments.fit(rows_per_input)
    scores = {name: Scores() for name in ("r2", "fvu", "fvu_nonlinear", *(f"r2_norm_{name}" for name in FIVE))}
    norms = {"error": [], "nonlinear": []}
    for batch in slices(test):
        x, row = batch["x"], batch["row"]
        if both := seen & set(row.unique().tolist()):
            raise ValueError(f"context {min(both)} is in both streams: split by context, not by token")
        parts = five(x)
        scores["r2"].add(parts["error"], parts["nonlinear"], row)
        scores["fvu"].add(x, parts["error"], row)
        scores["fvu_nonlinear"].add(x, parts["nonlinear"], row)
        target = squares(parts)
        residual = target - norm(x.double())
        for i, name in enumerate(FIVE):
            scores[f"r2_norm_{name}"].add(target[:, i : i + 1], residual[:, i : i + 1], row)
        for name in norms:
            norms[name].append(parts[name].norm(dim=1).cpu())
    at = FIVE.index("error")
    return ErrorSplit(vector, Linear(norm.W[:, at], norm.c[at]), scores, {k: torch.cat(v) for k, v in norms.items()})


def norm_scaling(norm_i: Tensor, norm_j: Tensor, nonlinear_i: Tensor) -> dict[str, float]:
    """How well ‖e_i‖ tells ‖e_j‖ of the same tokens [n]: r2 of least squares with bias; of what remains, the share that ‖nonlinear_i‖ removes."""

    def residual(*inputs):
        inputs = torch.stack([torch.ones_like(norm_j), *inputs], 1).double()
        return norm_j.double() - inputs @ torch.linalg.lstsq(inputs, norm_j.double()[:, None]).solution.squeeze(1)

    one, two = residual(norm_i).square().sum(), residual(norm_i, nonlinear_i).square().sum()
    total = (norm_j - norm_j.mean()).double().square().sum()
    return {"r2": float(1 - one / total), "removed": float(1 - two / one)}


def map_of_norms(norm_i: Tensor, norm_j: Tensor, n_contexts: int) -> Scores:
    """The least squares of `norm_scaling`, of ‖e_j‖ on ‖e_i‖, as scores by context, for the interval of its R²."""
    stream = in_batches(torch.stack([norm_i, norm_j], 1), len(norm_i) // n_contexts)
    return map_from(lambda b: b["x"][:, :1], lambda b: b["x"][:, 1:], stream, stream)


def group_r2(fit: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """R² on test tokens of the mean over each group of fitting tokens; (values [n], group [n]) of both, a new group gets the mean of all."""
    (v, group), (v_test, group_test) = fit, test
    n_groups = int(max(group.max(), group_test.max())) + 1
    count = torch.bincount(group, minlength=n_groups)
    mean = torch.bincount(group, v.double(), minlength=n_groups) / count.clamp_min(1)
    mean = torch.where(count > 0, mean, v.double().mean())
    v_test = v_test.double()
    return float(1 - (v_test - mean[group_test]).square().sum() / (v_test - v_test.mean()).square().sum())


@measuring
def norm_baselines(sae, fit, test, power: int = 2) -> dict[str, float]:
    """R² of ‖e‖^power on the test stream from what is cheaper than x: its length (‖x‖, ‖x‖²), the token, the position (means of groups)."""

    def target(batch):
        return (batch["x"] - sae(batch["x"]).x_hat).norm(dim=1, keepdim=True) ** power

    def length(batch):
        norm = batch["x"].norm(dim=1, keepdim=True)
        return torch.cat([norm, norm.square()], 1)

    values = {"‖x‖, ‖x‖²": map_from(length, target, fit, test).r2()}
    gathered = [
        {"target": torch.cat([target(b)[:, 0].cpu() for b in part])}
        | {key: torch.cat([b[key].cpu() for b in part]) for key in ("tokens", "position")}
        for part in (fit, test)
    ]
    for key in ("tokens", "position"):
        values[key] = group_r2(*((part["target"], part[key]) for part in gathered))
    return values


@measuring
def along_latents(sae, split: ErrorSplit, stream) -> dict[str, Tensor]:
    """Of every latent that fires on the stream: its mean activation, and W_dec · a for the probes a of ‖e‖² and of ‖x‖²."""
    moments, total = Moments(), 0
    for batch in stream:
        moments.add(batch["x"], batch["x"].square().sum(1, keepdim=True))
        total = total + sum(sae.encode(x).double().sum(0) for x in batch["x"].split(8192))
    W_dec, fired = sae.W_dec.double(), total > 0
    found = {"activation": total / moments.n, "‖e‖²": W_dec @ split.norm.W, "‖x‖²": W_dec @ moments.fit().W[:, 0]}
    return {name: value[fired].cpu() for name, value in found.items()}


@measuring
def patched_ce(lm, rows, hook_name: str, sae, split: ErrorSplit, batch_rows: int = 4) -> dict[str, float | list[float]]:
    """Cross-entropy with the activation at positions ≥ 1 replaced by x̂, x̂ + LinearError, x̂ + NonlinearError.

    recovered = (CE_sae − CE_setting) / (CE_sae − CE_clean), beside share = 1 − Σ‖x − patch‖² / Σ‖e‖², which says how much of
    the error's squared length the patch has put back; ratio = recovered / share as (value, low, high), batches of rows drawn again.
    A control (ours), "fraction": x̂ + s e with the share of the nonlinear error. Mean over predictions at positions ≥ 1 of
    `rows` [n, n_ctx].
    """
    settings = ("linear", "nonlinear", "fraction")
    nats, squares, n = [], [], 0
    for i in range(0, len(rows), batch_rows):
        tokens = torch.from_numpy(np.asarray(rows[i : i + batch_rows]).astype("int64")).to(lm.cfg.device)
        x = run_prefix(lm, tokens, [hook_name])[hook_name].float()
        x_hat = sae(x).x_hat
        linear, error = split.vector(x), x - x_hat
        patches = {"clean": x, "sae": x_hat, "linear": x_hat + linear, "nonlinear": x - linear}
        left = (linear[:, 1:].square().sum() / error[:, 1:].square().sum().clamp_min(1e-30)).sqrt()
        patches["fraction"] = x - left * error  # leaves as much of ‖e‖² as x̂ + NonlinearError does
        patches = {name: torch.cat([x[:, :1], patch[:, 1:]], 1) for name, patch in patches.items()}
        losses = [token_loss(run_spliced(lm, tokens, hook_name, p), tokens)[:, 1:] for p in patches.values()]
        nats.append([float(loss.double().sum()) for loss in losses])
        squares.append([float((x - patch).double().square().sum()) for patch in patches.values()])
        n += tokens[:, 2:].numel()
    nats, squares = torch.tensor(nats, dtype=torch.double), torch.tensor(squares, dtype=torch.double)
    values = {f"ce_{name}": float(total) / n for name, total in zip(patches, nats.sum(0))}
    drawn = torch.randint(len(nats), (1000, len(nats)), generator=torch.Generator().manual_seed(0))
    drawn = torch.cat([torch.arange(len(nats))[None], drawn])
    nats, squares = nats[drawn].sum(1), squares[drawn].sum(1)  # [1 + 1000, 5]
    for at, name in enumerate(settings, start=2):
        recovered = (nats[:, 1] - nats[:, at]) / (nats[:, 1] - nats[:, 0])
        share = 1 - squares[:, at] / squares[:, 1]
        values |= {f"recovered_{name}": float(recovered[0]), f"share_{name}": float(share[0])}
        values[f"ratio_{name}"] = with_interval(recovered / share)
    return values


@torch.no_grad()
def map_from(inputs, target, fit, test, rows_per_input: int = ROWS_PER_INPUT) -> Scores:
    """Least squares from inputs(batch) [n, d_u] to target(batch) [n, d_v], scored on the test stream: 1 − R² of it is left.

    With several hooks in one ActivationStore `inputs` may join what earlier components wrote, or their SAEs' reconstructions.
    """
    moments, scores = Moments(), Scores()
    for batch in fit:
        moments.add(inputs(batch), target(batch))
    linear = moments.fit(rows_per_input)
    for batch in test:
        v = target(batch)
        scores.add(v, v - linear(inputs(batch)), batch["row"])
    return scores


# ---------------------------------------------------------------------------------------------------------------------
# Controls (ours)
# ---------------------------------------------------------------------------------------------------------------------


@measuring
def identity(sae, stream) -> dict[str, float]:
    """How far an SAE is from Cov(e, x̂) = 0, in sample; there b* = Σ_x⁻¹ Σ_e and R² = tr(Σ_e Σ_x⁻¹ Σ_e) / tr Σ_e ≥ FVU.

    r2: of the probe; r2_identity: that formula; gap: their difference, absolute; distance: E‖x (b* − Σ_x⁻¹ Σ_e)‖² / tr Σ_e, by how much the two
    predictions differ; fvu; bound_holds: r2 ≥ fvu (up to 1e-9).
    """
    moments = Moments(joint=True)
    for batch in stream:
        moments.add(batch["x"], batch["x"] - sae(batch["x"]).x_hat)
    d, (_, cov) = moments.d_u, moments.covariance()
    xx, xe, ee = cov[:d, :d], cov[:d, d:], cov[d:, d:]
    b, b_identity, power = solve(xx, xe), solve(xx, ee), ee.trace().clamp_min(1e-300)
    r2, r2_identity = (xe * b).sum() / power, (ee * b_identity).sum() / power
    mean_error = moments.sums[0][d:] / moments.n
    fvu = (power + mean_error.square().sum()) / xx.trace()
    values = {"r2": r2, "r2_identity": r2_identity, "gap": (r2 - r2_identity).abs(), "fvu": fvu}
    values["distance"] = ((b - b_identity) * (xx @ (b - b_identity))).sum() / power
    return {key: float(value) for key, value in values.items()} | {"bound_holds": bool(r2 >= fvu - 1e-9)}


class Refitted:
    """An SAE's latents, frozen, with another decoder: x → SAEOutput."""

    def __init__(self, sae, W_dec: Tensor, b_dec: Tensor):
        self.sae, self.W_dec, self.b_dec = sae, W_dec, b_dec

    @torch.no_grad()
    def __call__(self, x: Tensor) -> SAEOutput:
        with inference(self.sae):
            out = copy.copy(self.sae(x))
        if out.active is None:
            x_hat = out.dense @ self.W_dec
        else:
            x_hat = sparse_decode(out.values.flatten(), out.active, self.W_dec)
        out.x_hat = (x_hat + self.b_dec).view(x.shape)
        return out


@measuring
def refit_decoder(sae, stream, ridge: float = 1e-9) -> Refitted:
    """argmin over W_dec, b_dec of Σ‖x − f W_dec − b_dec‖² with latents f frozen: the decoder optimum, where Cov(e, x̂) = 0.

    Normal equations [d_sae + 1, d_sae + 1] in fp64, summed from pairs of active latents; `ridge`, times the mean diagonal, keeps them
    solvable where latents always fire together. A latent that never fires keeps its row.
    """
    d = sae.d_sae
    gram = torch.zeros(d + 1, d + 1, dtype=torch.double, device=sae.W_dec.device)  # the last one is the bias
    target = torch.zeros(d + 1, sae.d_in, dtype=torch.double, device=sae.W_dec.device)
    for batch in stream:
        for x in batch["x"].split(4096):
            out, n = sae(x), len(x)
            if out.values is None or out.values.ndim == 1:
                f = out.latents.double()
                f = torch.cat([f, f.new_ones(n, 1)], 1)
                gram += f.T @ f
                target += f.T @ x.double()
                continue
            values = torch.cat([out.values.double(), out.values.new_ones(n, 1).double()], 1)
            indices = torch.cat([out.indices, torch.full_like(out.indices[:, :1], d)], 1)
            pairs = indices[:, :, None] * (d + 1) + indices[:, None, :]
            gram.view(-1).index_add_(0, pairs.flatten(), (values[:, :, None] * values[:, None, :]).flatten())
            entries = (values[:, :, None] * x.double()[:, None, :]).flatten(0, 1)
            target.index_add_(0, indices.flatten(), entries)
    fired = gram.diagonal() > 0
    gram, target = gram[fired][:, fired], target[fired]
    scale = gram.diagonal().rsqrt()  # every latent in units of its own size
    gram = gram * scale[:, None] * scale
    gram.diagonal().add_(ridge)
    solution = torch.linalg.solve(gram, target * scale[:, None]) * scale[:, None]
    full = torch.cat([sae.W_dec, sae.b_dec[None]]).detach().clone()
    full[fired] = solution.to(full.dtype)
    return Refitted(sae, full[:-1], full[-1])


class DeadSAE:
    """x̂ = mean: all of x is error, and all of it linear in x."""

    def __init__(self, mean: Tensor):
        self.mean = mean

    def __call__(self, x: Tensor) -> SAEOutput:
        return SAEOutput(self.mean.expand_as(x), dense=x.new_zeros(x.shape[:-1].numel(), 1))


class PrincipalComponents:
    """x̂ = the projection on the k directions of largest variance: its error is linear in x by construction."""

    def __init__(self, mean: Tensor, covariance: Tensor, k: int):
        self.mean, self.directions = mean, torch.linalg.eigh(covariance).eigenvectors[:, -k:]

    def __call__(self, x: Tensor) -> SAEOutput:
        latents = (x - self.mean) @ self.directions
        return SAEOutput(latents @ self.directions.T + self.mean, dense=latents.flatten(0, -2))


def matched_gaussian(mean: Tensor, covariance: Tensor, n: int, seed: int = 0) -> Tensor:
    """n draws [n, d] of a Gaussian: no features, but every probe that reads mean and covariance alone must find the same."""
    values, vectors = torch.linalg.eigh(covariance.double())
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, len(mean), generator=generator).to(mean.device)
    root = vectors * values.clamp_min(0).sqrt()
    return mean.float() + normal @ root.T.float()


def mean_and_covariance(stream) -> tuple[Tensor, Tensor]:
    """Of x over a stream, fp64: [d], [d, d]."""
    moments = Moments()
    for batch in stream:
        moments.add(batch["x"], batch["x"][:, :0])
    return moments.covariance()


@torch.no_grad()
def untrained(model: str, device: str, seed: int = 0, std: float = 0.02):
    """The language model with its weights drawn anew: matrices N(0, std²), biases 0, layer norms 1."""
    lm = load_language_model(model, device=device)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lm.named_parameters():
        if parameter.ndim > 1:
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
        else:
            parameter.fill_(float(name.endswith("weight")))
    return lm
