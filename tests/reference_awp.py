"""Adversarial weight perturbation as its authors' code computes it: a proxy network beside the one that is trained."""

import copy

import torch
import torch.nn.functional as F
from reference_mart import linf_attack as away_from_the_label
from reference_pgd import uniform_start
from reference_trades import divergence, linf_attack


class Proxy:
    """A copy of the network, which takes a step of SGD up the loss: by it the weights are moved, and moved back."""

    def __init__(self, model, gamma, rate=0.01):
        self.model, self.gamma, self.proxy = model, gamma, copy.deepcopy(model)
        self.optimizer = torch.optim.SGD(self.proxy.parameters(), lr=rate)

    def difference(self, loss_of):
        self.proxy.load_state_dict(self.model.state_dict())
        self.proxy.train()
        loss = -loss_of(self.proxy)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        result, stepped = {}, self.proxy.state_dict()
        for name, old in self.model.state_dict().items():
            if old.dim() > 1 and "weight" in name:
                change = stepped[name] - old
                result[name] = old.norm() / (change.norm() + 1e-20) * change
        return result

    @torch.no_grad()
    def move(self, difference, sign):
        for name, p in self.model.named_parameters():
            if name in difference:
                p.add_(sign * self.gamma * difference[name])


def trades_of(model, x, x_adv, y, beta):
    return F.cross_entropy(model(x), y) + beta * divergence(model, x_adv, x) / len(x)


def trades_awp_update(proxy, x, x_adv, y, optimizer, beta):
    """An update on x'; without a proxy one of the warm-up."""
    model = optimizer.model
    if proxy is not None:
        difference = proxy.difference(lambda of: trades_of(of, x, x_adv, y, beta))
        proxy.move(difference, 1)
    robust = divergence(model, x_adv, x) / len(x)  # batch norm sees x', then x, then x again
    loss = F.cross_entropy(model(x), y) + beta * robust
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if proxy is not None:
        proxy.move(difference, -1)
    return loss.detach()


def trades_awp_step(proxy, x, y, optimizer, epsilon, step_size, steps, beta):
    model = optimizer.model.eval()
    x_adv = linf_attack(model, x, x + 0.001 * torch.randn(x.shape), step_size, epsilon, steps)
    model.train()
    return trades_awp_update(proxy, x, x_adv, y, optimizer, beta)


def at_awp_step(proxy, x, y, optimizer, epsilon, step_size, steps):
    model = optimizer.model.eval()
    x_adv = away_from_the_label(model, x, y, uniform_start(x, epsilon, "l_inf"), step_size, epsilon, steps)
    model.train()
    difference = proxy.difference(lambda of: F.cross_entropy(of(x_adv), y))
    proxy.move(difference, 1)
    loss = F.cross_entropy(model(x_adv), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    proxy.move(difference, -1)
    return loss.detach()


def sgd_of(model):
    """The authors' optimizer, which knows its model."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    optimizer.model = model
    return optimizer
