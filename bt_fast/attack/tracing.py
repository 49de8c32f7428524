"""A model's computation as a graph, by `torch.fx`, with the modules that cannot be traced left in it as they are.

A forward that asks an image for its device or dtype, or decides by its shape, gets its answers from small batches that
run through the graph as far as it is known; a question about pixels, or about the number of images, has none. Where
there is no answer, the innermost module that asked becomes one node of the graph, which runs the module's own code.
"""

from __future__ import annotations

import operator
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute, TraceError
from torch.optim.swa_utils import AveragedModel

from bt_fast.attack.wrapped import SPREAD, inside, spread

_POOLS = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_REMEDY = (
    "what is traced must not decide by the images' values: decide by their shape, or put what decides into a function "
    "marked by torch.fx.wrap"
)
# what a tensor is asked for that is not a number of it
_FORM = frozenset({"device", "dtype", "ndim", "is_cuda", "is_cpu", "is_mps", "is_xpu", "is_meta", "layout"})
_METHODS = frozenset({"size", "dim", "ndimension", "numel", "nelement", "is_floating_point", "is_complex"})
_FUNCTIONS = (len, torch.numel, torch.is_floating_point, torch.is_complex)


class NotFoldedError(Exception):
    """A model that cannot be folded, and why."""


@dataclass(frozen=True, eq=False)
class Trace:
    """A model's computation.

    Attributes:
        graph: of the model's own modules and tensors.
        kept: by the name of each module that runs as it is, why.
        decides: what of the images it has fixed: "form", their dtype and device, or "shape", that of one image.
    """

    graph: fx.GraphModule
    kept: dict[str, str]
    decides: frozenset[str]


def trace(
    model: nn.Module, x: Tensor, leaf: Callable[[nn.Module], bool], precision: Callable[[], AbstractContextManager[Any]]
) -> Trace:
    """The computation of a model in eval mode for images like x [n, ...].

    Args:
        leaf: the modules that the graph calls, beside those of torch.
        precision: the autocast under which the graph will run.

    Raises:
        NotFoldedError: the model has a hook, is spread over devices, or its own forward cannot be traced.
    """
    if name := hooked(model):
        raise NotFoldedError(f"{name} has a hook, which a folded model would not run")
    if spread(model):
        raise NotFoldedError(SPREAD)
    written = as_written(model)
    root = _ImagesAlone(written).eval()
    answers = _Answers(root, x, precision)
    tracer = _Tracer(written, leaf, answers)
    try:
        with _length_of_proxies(written):
            traced = tracer.trace(root)
        answers.leave_out_checks(traced)
        for node in traced.nodes:
            node.meta.pop("is_wrapped", None)  # else the code would look for the pools by a name that is no module's
        graph = fx.GraphModule(root, traced)
    except Exception as error:  # whatever the model's own code raises on a proxy
        raise NotFoldedError(f"it cannot be traced: {reason_of(error)}; {_REMEDY}") from error
    return Trace(graph.eval(), tracer.kept, frozenset(answers.decided))


class _ImagesAlone(nn.Module):
    """A model called with its images alone, so that other arguments of its forward have their defaults."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.model(x))


class _Asked:
    """A proxy that answers what is known of it."""

    tracer: Any
    node: Any

    def __getattr__(self, name: str) -> Any:
        if name in _FORM:
            return self.tracer.answers.form(self.node, name)
        return _AskedAttribute(cast(fx.Proxy, self), name)

    def __index__(self) -> int:
        return operator.index(self.tracer.answers.settled(self.node))

    def __int__(self) -> int:
        return int(self.tracer.answers.settled(self.node))

    def __float__(self) -> float:
        return float(self.tracer.answers.settled(self.node))

    def __round__(self, digits: int | None = None) -> Any:
        return round(self.tracer.answers.settled(self.node), digits)

    def __len__(self) -> int:
        return cast(int, self.tracer.answers.length(self.node))


class _AskedProxy(_Asked, fx.Proxy):
    pass


class _AskedAttribute(_Asked, Attribute):
    pass


class _Tracer(fx.Tracer):
    """Looks into wrappers and compiled modules, lets a pool's size be one that is traced, and leaves out what fails."""

    proxy_buffer_attributes = True  # what is computed of a buffer follows it

    def __init__(self, model: nn.Module, leaf: Callable[[nn.Module], bool], answers: _Answers) -> None:
        super().__init__(autowrap_functions=_POOLS)
        self._autowrap_search.append(F)  # torch 2.6 takes numbers only where they are called
        self._model, self._leaf, self.answers = model, leaf, answers
        self._read: dict[str, Any] = {}  # proxies of parameters and buffers by their names
        self.kept: dict[str, str] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """One that answers."""
        proxy = _AskedProxy(node, self)
        self.answers.proxies[node] = ref(proxy)
        return proxy

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Torch's own modules, the caller's leaves and what is spread over devices, but never the model itself."""
        leaf = self._leaf(m) or spread(m) or super().is_leaf_module(m, module_qualified_name)
        return leaf and m is not self._model

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """As `fx.Tracer`, but no proxy to what runs to answer a question."""
        if self.answers.running:
            return attr_val
        self._read = parameter_proxy_cache
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(
        self, m: nn.Module, forward: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        """As `fx.Tracer`, but a compiled module is its own Python code, and one that cannot be traced a leaf."""
        if self.answers.running:
            return forward(*args, **kwargs)
        written = as_written(m)  # which, if compiled in place, would call its compiled code
        if written is not m or m._compiled_call_impl is not None:
            forward = written._call_impl
        name = self.path_of_module(written)
        if written is self._model or self.is_leaf_module(written, name):
            return super().call_module(written, forward, args, kwargs)
        last, stack, kept = next(iter(reversed(self.graph.nodes)), None), dict(self.module_stack), dict(self.kept)
        try:
            return super().call_module(written, forward, args, kwargs)
        except Exception as error:  # whatever its code raises on a proxy
            self._forget_after(last)
            self.module_stack.clear()
            self.module_stack.update(stack)
            self.kept = {**kept, name.removeprefix("model."): f"{reason_of(error)}"}
            return self.create_proxy("call_module", name, args, kwargs)

    def _forget_after(self, last: fx.Node | None) -> None:
        """Take back all nodes since."""
        taken = set()
        for node in list(reversed(self.graph.nodes)):
            if node is last:
                break
            self.graph.erase_node(node)
            taken.add(node)
        for name in [name for name, proxy in self._read.items() if proxy.node in taken]:
            del self._read[name]

    def to_bool(self, obj: fx.Proxy) -> bool:
        """What a forward decides by, if it is neither a pixel nor the number of images."""
        return bool(self.answers.settled(obj.node))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """The parts of what has a known length."""
        parts: Any = obj
        return iter([parts[k] for k in range(self.answers.length(obj.node))])


class _Answers:
    """What is known of the nodes of a graph: their values for two images and for three.

    Of these only shapes, dtypes and devices are told, and what is computed of them, where it is the same for any
    number of images.
    """

    def __init__(self, root: nn.Module, x: Tensor, precision: Callable[[], AbstractContextManager[Any]]) -> None:
        self._root, self._precision = root, precision
        self._images = [x[:1].detach().repeat(n, *[1] * (x.dim() - 1)) for n in (2, 3)]
        self._values: dict[fx.Node, list[Any]] = {}
        self._held: set[fx.Node] = set()  # whose values are whole
        self.proxies: dict[fx.Node, ref[fx.Proxy]] = {}  # which the forward may still use
        self.running = False
        self.decided: set[str] = set()  # by what the forward has decided

    def form(self, node: fx.Node, name: str) -> Any:
        """The device, dtype or layout of a tensor."""
        self.decided.add("form")
        return getattr(self._of(node)[0], name)

    def settled(self, node: fx.Node) -> Any:
        """The value of a node that neither a pixel nor the number of images changes; else a TraceError."""
        if not self._is_settled(node):
            raise TraceError("symbolically traced variables cannot be used as inputs to control flow")
        self.decided.add("shape")
        return self._of(node)[0]

    def length(self, node: fx.Node) -> int:
        """The length of a tensor's first dimension or of several values, if it is that of any number of images."""
        first, second = self._of(node)
        if not isinstance(first, (Tensor, tuple, list)) or len(first) != len(second):
            raise TraceError("what is traced cannot be iterated over, or its length depends on the number of images")
        self.decided.add("shape")
        return len(first)

    def _of(self, node: fx.Node) -> list[Any]:
        if node not in self._values:
            later = []
            for other in reversed(node.graph.nodes):
                if other in self._values:
                    break
                later.append(other)
            self.running = True
            try:
                with torch.no_grad(), self._precision():
                    for other in reversed(later):
                        self._values[other] = [self._run(other, k) for k in range(len(self._images))]
                        if isinstance(self._values[other][0], Tensor):
                            self._held.add(other)
            finally:
                self.running = False
            self._let_go()
        return self._values[node]

    def _let_go(self) -> None:
        """Keep no more than the form of the tensors that no later node can use."""
        for node in [node for node in self._held if (proxy := self.proxies.get(node)) is None or proxy() is None]:
            self._held.remove(node)
            self._values[node] = [v.new_empty(()).expand(v.shape) for v in self._values[node]]

    def leave_out_checks(self, graph: fx.Graph) -> None:
        """Take away assertions that hold whatever the images are, and what only answers have used."""
        for node in reversed(graph.nodes):
            if node.target is torch._assert and isinstance(node.args[0], fx.Node) and self._holds(node.args[0]):
                self.decided.add("shape")
                graph.erase_node(node)
            elif not node.users and _is_pure(node):
                graph.erase_node(node)

    def _holds(self, node: fx.Node) -> bool:
        try:
            return self._is_settled(node) and bool(self._of(node)[0])
        except Exception:  # it is asked again in each forward, then
            return False

    def _run(self, node: fx.Node, k: int) -> Any:
        if node.op == "placeholder":
            return self._images[k].clone()
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self._root)
        args: Any = fx.node.map_arg(node.args, lambda n: self._values[n][k])
        kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: self._values[n][k])
        if node.op == "call_function":
            return cast(Callable[..., Any], node.target)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return self._root.get_submodule(str(node.target))(*args, **kwargs)

    def _is_settled(self, node: fx.Node) -> bool:
        first, second = self._of(node)
        if isinstance(first, Tensor) or node.op == "call_module":
            return False
        if _is_form(node):  # without a 0, which may be the number of pixels that fulfil something
            return bool(first == second) and not (type(first) is int and first == 0)
        if node.target in (operator.eq, operator.ne) and all(isinstance(a, fx.Node) and _is_form(a) for a in node.args):
            return bool(first == second)  # two shapes
        return all(self._is_settled(n) for n in node.all_input_nodes)


def _is_form(node: fx.Node) -> bool:
    """Whether it is read from a tensor, or is a part of what is, without a look at its numbers."""
    if node.op == "call_method":
        return node.target in _METHODS
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and _is_sizes(node.args[0])
    return node.target in _FUNCTIONS or (node.target is getattr and node.args[1] in _FORM | {"shape"})


def _is_pure(node: fx.Node) -> bool:
    """Whether it does nothing but give its value."""
    if node.op == "call_function":
        name, home = getattr(node.target, "__name__", ""), getattr(node.target, "__module__", None)
        in_place = name in ("setitem", "delitem", "setattr") or (
            name.startswith("i") and hasattr(operator, f"__{name}__")
        )
        return home in ("_operator", "builtins", "math") and not in_place
    return node.op == "get_attr" or _is_form(node)


def _is_sizes(node: fx.Node) -> bool:
    """Whether it is a tensor's shape or a slice of it."""
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and _is_sizes(node.args[0])
    return node.target == "size" or (node.target is getattr and node.args[1] == "shape")


@contextmanager
def _length_of_proxies(model: nn.Module) -> Iterator[None]:
    """`len` in the modules' own source files gives a traced number where it is that of the images."""
    forwards: list[Any] = [getattr(type(m), "forward", None) for m in model.modules()]
    spaces = {id(f.__globals__): f.__globals__ for f in forwards if hasattr(f, "__globals__")}
    changed = [space for space in spaces.values() if "len" not in space]
    for space in changed:
        space["len"] = _length
    try:
        yield
    finally:
        for space in changed:
            del space["len"]


def _length(values: Any) -> Any:
    if not isinstance(values, _Asked):
        return len(values)
    try:
        return len(values)
    except TraceError:
        return values.tracer.create_proxy("call_function", len, (values,), {})


def as_written(module: nn.Module) -> nn.Module:
    """The module inside a compiled module, an average, or a wrapper for several ranks or for a single device."""
    while True:
        # the class of compiled modules would import the compiler
        inner = module.module if type(module) is AveragedModel else getattr(module, "_orig_mod", None) or inside(module)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def hooked(model: nn.Module) -> str | None:
    """The name of a module with a hook."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = model.named_modules()
    return next((name or "the model" for name, module in modules if any(getattr(module, k) for k in kinds)), None)


def reason_of(error: Exception) -> str:
    """The model's own line that raised an error, if there is one, and what it raised."""
    ours = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))
    lines = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*ours, "<"))]
    where = f"line {lines[-1].lineno} of {Path(lines[-1].filename).name}, `{lines[-1].line}`: " if lines else ""
    return f"{where}{first_line(error)}"


def first_line(error: Exception) -> str:
    """An error's kind and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
