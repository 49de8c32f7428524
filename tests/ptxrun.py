"""Executes the PTX of one kernel on the CPU with numpy: one CTA at a time, one array lane for each thread.

    stats = launch(ptx_text, grid=(m, 3), args=[x, y, 7, 0.5], shared=metadata.shared)  # arrays are changed in place

For checking Triton's code without a GPU: layout conversions, shuffles, shared memory, barriers, predication and vector
accesses run as compiled. Strict: an instruction, modifier or operand form that is not implemented raises UnknownError
when the text is decoded, before anything runs. FaultError is raised where a GPU would fault or behave undefined:

- a global access outside the buffer that its address points into, or not aligned to its whole (vector) width
- a read of shared memory that this CTA has not written (check_uninit), a shared access outside `shared` bytes
- a data race: two warps of a CTA with no barrier between, or two CTAs, touch the same bytes, one writing without an
  atomic (check_races)
- lanes of one store that put different values at one address; a shuffle or redux from a lane that is not there; a
  barrier that not every thread reaches

Threads of one warp are taken to run in lock step, so a missing __syncwarp is not seen. Registers start as a NaN-like
poison. Not modelled: time, caches, weak memory order, tensor cores, TMA, local memory, calls. Arithmetic is correctly
rounded (fma too); the .approx/.full functions are computed correctly rounded and then, with approx_ulp=k, moved by up
to k ulp at random (seeded).
"""

import re
from fractions import Fraction

import numpy as np


class PtxError(Exception):
    pass


class UnknownError(PtxError):
    pass


class FaultError(PtxError):
    pass


UINT = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SINT = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLT = {16: np.float16, 32: np.float32, 64: np.float64}
TYPES = {
    "pred": ("p", 1, np.bool_),
    "f16x2": ("f", 32, np.float16),
    "f32x2": ("f", 64, np.float32),
    "bf16": ("B", 16, np.uint16),
    "bf16x2": ("B", 32, np.uint16),
    "u16x2": ("u", 32, np.uint16),
    "s16x2": ("s", 32, np.int16),
}
for _w in UINT:
    TYPES.update({f"b{_w}": ("b", _w, UINT[_w]), f"u{_w}": ("u", _w, UINT[_w]), f"s{_w}": ("s", _w, SINT[_w])})
    if _w in FLT:
        TYPES[f"f{_w}"] = ("f", _w, FLT[_w])
POISON = {16: 0x7EAD, 32: 0x7FC0DEAD, 64: 0x7FF8DEADDEADDEAD}
HINTS = {
    "weak",
    "volatile",
    "relaxed",
    "acquire",
    "release",
    "acq_rel",
    "cta",
    "cluster",
    "gpu",
    "sys",
    "ca",
    "cg",
    "cs",
    "cv",
    "lu",
    "wb",
    "wt",
    "nc",
    "L1::evict_normal",
    "L1::evict_last",
    "L1::evict_first",
    "L1::no_allocate",
    "L1::evict_unchanged",
    "L2::cache_hint",
    "L2::64B",
    "L2::128B",
    "L2::256B",
}
CMP = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
ARITY = {
    o: n
    for n, os in {
        (0,): "ret exit trap fence membar griddepcontrol",
        (1,): "bra activemask nanosleep",
        (1, 2): "bar barrier",
        (5,): "shfl bfi lop3",
        (2,): "ld st mov cvta neg abs not sqrt rsqrt rcp ex2 lg2 sin cos tanh popc clz brev ldmatrix stmatrix",
        (2, 3): "cvt red",
        (3, 4): "atom min max setp",
        (3,): "add sub mul div rem and or xor shl shr copysign redux vote",
        (4,): "mad fma selp bfe prmt shf",
    }.items()
    for o in os.split()
}
BUF_SHIFT = np.uint64(36)  # the high bits of a global address number its buffer


def f32_to_bf16(v):
    u = np.ascontiguousarray(v, np.float32).view(np.uint32).astype(np.uint64)
    r = ((u + np.uint64(0x7FFF) + ((u >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(v), np.uint16(0x7FFF), r)


def bf16_to_f32(u):
    return (u.astype(np.uint32) << np.uint32(16)).view(np.float32)


def fma32(a, b, c):
    """Correctly rounded a*b+c in float32: exact product in float64, sum rounded to odd, one rounding to float32."""
    p, c = a.astype(np.float64) * np.asarray(b, np.float64), np.asarray(c, np.float64)
    s = np.ascontiguousarray(p + c)
    t = s - p
    err = (p - (s - t)) + (c - t)
    i = s.view(np.int64)
    fix = (err != 0) & ((i & 1) == 0) & np.isfinite(s) & np.isfinite(err)
    return np.where(fix, i + np.where((err > 0) == (s > 0), 1, -1), i).view(np.float64).astype(np.float32)


def fma64(a, b, c):
    a, b, c = np.broadcast_arrays(a, b, c)
    out, memo = np.empty(a.shape), {}
    for k, t in enumerate(zip(a.tolist(), b.tolist(), c.tolist(), strict=True)):
        if t not in memo:
            x, y, z = t
            r = x * y + z
            if np.isfinite(r) and x * y + z != 0:
                r = float(Fraction(x) * Fraction(y) + Fraction(z))
            memo[t] = r
        out[k] = memo[t]
    return out


def fmin(a, b, c=None):
    if c is not None:
        a = fmin(a, b)
        b = c
    r = np.fmin(a, b)
    return np.where((a == 0) & (b == 0), np.where(np.signbit(a), a, b), r)


def fmax(a, b, c=None):
    if c is not None:
        a = fmax(a, b)
        b = c
    r = np.fmax(a, b)
    return np.where((a == 0) & (b == 0), np.where(np.signbit(a), b, a), r)


def mulhi64(a, b, signed):
    ua, ub, m, s = a.view(np.uint64), np.asarray(b).view(np.uint64), np.uint64(0xFFFFFFFF), np.uint64(32)
    t = (ua & m) * (ub >> s) + (((ua & m) * (ub & m)) >> s)
    u = (ua >> s) * (ub & m) + (t & m)
    h = (ua >> s) * (ub >> s) + (t >> s) + (u >> s)
    if signed:
        h = h - np.where(a < 0, ub, np.uint64(0)) - np.where(np.asarray(b) < 0, ua, np.uint64(0))
    return h.view(a.dtype)


def idivrem(a, b, rem):
    z = b == 0
    q = np.where(z, 1, b).astype(a.dtype)
    r = np.fmod(a, q)  # truncating, as PTX
    out = r if rem else (a - r) // q
    return np.where(z, a if rem else np.array(-1).astype(a.dtype), out)


class Races:
    """The last writer and the readers of every byte, as cta<<32 | epoch<<8 | warp.

    -1: nobody; reader warp 255: several warps; reader -2: several CTAs.
    """

    def __init__(self, n):
        self.w, self.r = np.full(n, -1, np.int64), np.full(n, -1, np.int64)

    @staticmethod
    def clash(old, me):
        other_cta = (old != -1) & ((old == -2) | (old >> 32 != me >> 32))
        return other_cta | ((old >= 0) & (old >> 8 == me >> 8) & (old != me))

    def load(self, i, me, what):
        if self.clash(self.w[i], me).any():
            raise FaultError(f"race: {what} reads bytes that another warp or CTA writes with no barrier between")
        o = self.r[i]
        self.r[i] = np.where(
            (o == -2) | ((o != -1) & (o >> 32 != me >> 32)), -2, np.where((o >> 8 == me >> 8) & (o != me), me | 255, me)
        )

    def store(self, i, me, what):
        if self.clash(self.w[i], me).any() or self.clash(self.r[i], me).any():
            raise FaultError(
                f"race: {what} writes bytes that another warp or CTA reads or writes with no barrier between"
            )
        self.w[i] = me


class At:
    """An array argument whose device address is `offset` bytes past a 256-byte boundary."""

    def __init__(self, array, offset=0):
        self.array, self.offset = array, offset


class Buffer:
    def __init__(self, a, number, races):
        if isinstance(a, At):
            a, off = a.array, a.offset
        else:
            off = 0
        self.array, self.n, self.off = a, a.nbytes, off
        self.base = (number << int(BUF_SHIFT)) + off
        raw = np.zeros((off + a.nbytes + 63) // 32 * 32, np.uint8)
        raw[off : off + a.nbytes] = np.ascontiguousarray(a).view(np.uint8).reshape(-1)
        self.raw, self.views, self.races = (
            raw,
            {k: raw.view(UINT[8 * k]) for k in (1, 2, 4, 8)},
            Races(raw.size) if races else None,
        )

    def back(self):
        self.array[...] = self.raw[self.off : self.off + self.n].view(self.array.dtype).reshape(self.array.shape)


def split_ops(s):
    out, depth, cur = [], 0, ""
    for ch in s:
        depth += (ch in "[{(") - (ch in "]})")
        if ch == "," and depth == 0:
            out.append(cur.strip())
            cur = ""
        else:
            cur += ch
    return [*out, cur.strip()] if cur.strip() else out


class Program:
    """The parsed text: statements (guard, negated, opcode, operands, source), labels, registers and parameters."""

    def __init__(self, text):
        text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.S)
        text = re.sub(r"^[ \t]*\.(loc|file)\b[^\n]*", "", text, flags=re.M)
        e = re.findall(r"\.entry\s+([\w$]+)\s*\(", text)
        if len(e) != 1:
            raise UnknownError(f"one .entry expected, found {e}")
        m = re.search(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", text)
        self.name, head = m.group(1), m.group(3)
        self.params = []
        for p in split_ops(m.group(2)):
            q = re.fullmatch(r"\.param\s+\.(\w+)\s+(?:\.ptr\s+)?(?:\.global\s+)?(?:\.align\s+\d+\s+)?([\w$]+)", p)
            if not q:
                raise UnknownError(f"parameter {p}")
            self.params.append((q.group(2), q.group(1)))
        r = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", head)
        self.reqntid = tuple(int(x or 1) for x in r.groups()) if r else None
        self.stmts, self.labels, self.regs, self.shared_syms, self.static_shared = [], {}, {}, {}, 0
        for d in re.findall(r"(\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]", text):
            al = int(d[1])
            if d[0]:
                continue
            self.static_shared = -(-self.static_shared // al) * al
            self.shared_syms[d[2]] = self.static_shared
            self.static_shared += int(d[3])
        for d in re.findall(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\]", text):
            self.shared_syms[d] = -(-self.static_shared // 16) * 16
        self._body(text, m.end())

    def _body(self, text, i):
        scopes, cur, count = [{}], "", 0
        while scopes:
            ch = text[i]
            i += 1
            if ch == "{" and not cur.strip():
                scopes.append({})
            elif ch == "}" and not cur.strip():
                scopes.pop()
            elif ch == ":" and re.fullmatch(r"\s*[\w$%]+", cur):
                self.labels[cur.strip()] = len(self.stmts)
                cur = ""
            elif ch == ";":
                count = self._stmt(" ".join(cur.split()), scopes, count)
                cur = ""
            else:
                cur += ch

    def _stmt(self, s, scopes, count):
        if s.startswith(".reg"):
            ty, names = re.fullmatch(r"\.reg\s*\.(\w+)\s+(.+)", s).groups()
            if ty not in TYPES:
                raise UnknownError(f"register type {s}")
            for n in names.split(","):
                q = re.fullmatch(r"(%?[\w$]+)<(\d+)>", n.strip())
                for nm in [f"{q.group(1)}{k}" for k in range(int(q.group(2)))] if q else [n.strip()]:
                    scopes[-1][nm] = f"{nm}#{count}" if len(scopes) > 1 else nm
                    self.regs[scopes[-1][nm]] = TYPES[ty][1]
            return count + 1
        if s.startswith(".pragma") or s.startswith(".shared"):
            return count
        if s.startswith("."):
            raise UnknownError(f"directive {s}")
        m = re.fullmatch(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", s, re.S)
        if not m:
            raise UnknownError(f"statement {s}")

        def rename(t):
            return re.sub(
                r"%?[A-Za-z_$][\w$]*(?:\.\w+)?",
                lambda x: next((c[x.group()] for c in reversed(scopes) if x.group() in c), x.group()),
                t,
            )

        self.stmts.append(
            (
                rename(m.group(2)) if m.group(2) else None,
                bool(m.group(1)),
                m.group(3),
                [rename(o) for o in split_ops(m.group(4))],
                s,
            )
        )
        return count


class Block:
    """One CTA's state and the decoded program: every instruction is a closure over preallocated register rows."""

    def __init__(self, prog, block, grid, args, shared, check_races, check_uninit, approx_ulp, seed, stats):
        self.p, self.n = prog, int(np.prod(block))
        n = self.n
        if n % 32:
            raise UnknownError("the number of threads must be a multiple of 32")
        self.check_races, self.check_uninit, self.ulp, self.salt, self.stats = (
            check_races,
            check_uninit,
            approx_ulp,
            np.uint64(seed * 0x1234567),
            stats,
        )
        self.R, self.where = {}, {}
        for w in (1, 16, 32, 64):
            names = [k for k, v in prog.regs.items() if v == w]
            self.R[w] = np.zeros((len(names), n), np.bool_ if w == 1 else UINT[w])
            self.where.update({k: (w, i) for i, k in enumerate(names)})
        t = np.arange(n, dtype=np.uint32)
        self.lane, self.warp, self.all = (t & 31).astype(np.int64), (t >> 5).astype(np.int64), np.arange(n)
        one = np.uint64(1)
        lane = self.lane.astype(np.uint64)
        lt = (one << lane) - one
        self.special = {
            "%laneid": t & 31,
            "%warpid": t >> 5,
            "%nwarpid": t * 0 + n // 32,
            "WARP_SZ": t * 0 + 32,
            "%lanemask_lt": lt,
            "%lanemask_le": (lt << one) | one,
            "%lanemask_eq": one << lane,
            "%lanemask_gt": ~((lt << one) | one),
            "%lanemask_ge": ~lt,
        }
        self.special = {k: v.astype(np.uint32) for k, v in self.special.items()}
        div = np.uint32(1)
        for ax, b, g in zip("xyz", block, grid, strict=True):
            self.special.update(
                {
                    f"%tid.{ax}": t // div % np.uint32(b),
                    f"%ntid.{ax}": t * 0 + np.uint32(b),
                    f"%ctaid.{ax}": t * 0,
                    f"%nctaid.{ax}": t * 0 + np.uint32(g),
                }
            )
            div *= np.uint32(b)
        self.shared = np.zeros(-(-max(shared, prog.static_shared) // 16) * 16 + 16, np.uint8)
        self.shared_n = max(shared, prog.static_shared)
        self.sviews = {k: self.shared.view(UINT[8 * k]) for k in (1, 2, 4, 8)}
        self.sinit, self.srace = np.zeros(self.shared.size, bool), Races(self.shared.size)
        self.bufs, self.pv = {}, {}
        args = list(args) + [0] * (len(prog.params) - len(args))
        if len(args) != len(prog.params):
            raise PtxError(f"{len(args)} arguments for {len(prog.params)} parameters")
        for k, ((nm, ty), a) in enumerate(zip(prog.params, args, strict=True)):
            if isinstance(a, (np.ndarray, At)):
                same = [b for b in self.bufs.values() if b.array is a]
                b = same[0] if same else Buffer(a, k + 1, check_races)
                self.bufs[int(b.base) >> int(BUF_SHIFT)] = b
                a = b.base
            kind, w, dt = TYPES[ty]
            self.pv[nm] = (
                np.array(a, dt).tobytes() if kind == "f" else (int(a) & ((1 << w) - 1)).to_bytes(w // 8, "little")
            )
        self.code = []
        for guard, neg, op, ops, src in prog.stmts:
            base, *mods = op.split(".")
            f = getattr(self, "i_" + base, None)
            if f is None or len(ops) not in ARITY[base]:
                raise UnknownError(src)
            self.src = src
            try:
                act = f(mods, ops)
            except (KeyError, ValueError, IndexError, TypeError, AttributeError, AssertionError) as e:
                raise UnknownError(f"{src}   ({e!r})") from e
            g = None
            if guard is not None:
                w, i = self.where[guard]
                g = self.R[1][i]
            self.code.append((g, neg, act, op, src))

    # ---- operands
    def mods(self, mods, *allowed):
        """Splits modifiers into at most one of each set; any other modifier is unknown."""
        left, out = list(mods), []
        for a in allowed:
            hit = [m for m in left if m in a]
            if len(hit) > 1 and a is not HINTS:
                raise UnknownError(self.src)
            for h in hit:
                left.remove(h)
            out.append(hit[0] if hit else None)
        if left:
            raise UnknownError(f"{self.src}   (modifier {left})")
        return out

    def ty(self, mods, ok=None):
        t = mods[-1]
        if t not in TYPES or (ok and TYPES[t][0] not in ok):
            raise UnknownError(self.src)
        return mods[:-1], t

    def imm(self, tok, ty):
        kind, w, dt = TYPES[ty]
        if kind == "p":
            return np.bool_(int(tok, 0))
        if m := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", tok):
            raw, bits = int(m.group(1), 16), 32
        elif m := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", tok):
            raw, bits = int(m.group(1), 16), 64
        else:
            raw, bits = int(tok.rstrip("U"), 0), w
            if kind == "f" and w >= 32 and not tok.lower().startswith("0x"):
                raise UnknownError(f"{self.src}   (integer for a float)")
        if bits != w and kind == "f":
            if (bits, w) == (64, 32):
                return np.float32(np.array([raw], np.uint64).view(np.float64)[0])
            raise UnknownError(self.src)
        return np.array([raw & ((1 << w) - 1)], UINT[w]).view(dt)[0 if np.dtype(dt).itemsize * 8 == w else slice(None)]

    def val(self, tok, ty, loose=False):
        """Returns a function that gives the operand's value as an array of the type (or a numpy scalar)."""
        kind, w, dt = TYPES[ty]
        neg = kind == "p" and tok.startswith("!")
        tok = tok.lstrip("!") if neg else tok
        if tok in self.where:
            rw, i = self.where[tok]
            row = self.R[rw][i]
            if (rw == 1) != (kind == "p"):
                raise UnknownError(self.src)
            if neg:
                return lambda: ~row
            if rw == w:
                v = row.view(dt)
                return lambda: v
            if rw > w and loose:
                return lambda: row.astype(UINT[w]).view(dt)
            raise UnknownError(f"{self.src}   (register width)")
        if tok in self.special:
            v = self.special[tok]
            if w == 32:
                return lambda: v.view(dt)
            return lambda: v.astype(dt)
        v = dt(self.p.shared_syms[tok]) if tok in self.p.shared_syms else self.imm(tok, ty)
        return lambda: v

    def dst(self, tok, ty):
        """Returns the destination row; a register wider than the type is sign- or zero-extended into."""
        kind, w, dt = TYPES[ty]
        if tok == "_":
            return np.empty(self.n, dt)
        rw, i = self.where[tok]
        if (rw == 1) != (kind == "p") or rw < w:
            raise UnknownError(self.src)
        return self.R[rw][i].view(dt if rw == w else (SINT if kind == "s" else UINT)[rw])

    @staticmethod
    def put(d, v, m):
        if m is None:
            d[...] = v
        else:
            np.copyto(d, v, where=m if d.size == m.size else np.repeat(m, d.size // m.size), casting="unsafe")

    def address(self, tok, bits):
        m = re.fullmatch(r"\[\s*([%\w$#.]+)\s*(?:\+\s*(-?\w+)\s*)?\]", tok)
        base, off = m.group(1), int(m.group(2) or "0", 0)
        if re.fullmatch(r"-?\d+", base):
            raise UnknownError(self.src)
        if base in self.where and self.where[base][0] == 64:
            bits = 64
        a, off = self.val(base, f"u{bits}"), np.uint64(off & (2**64 - 1))
        if bits == 64:
            return lambda: np.broadcast_to(a() + off, self.n)
        return lambda: np.broadcast_to((np.asarray(a(), np.uint64) + off) & np.uint64(0xFFFFFFFF), self.n)

    def vec(self, tok):
        return [x.strip() for x in tok.strip("{} ").split(",")] if tok.startswith("{") else [tok]

    # ---- memory
    def locate(self, a, nb, m, space):
        """Returns byte offsets, typed views and the race log of the memory at these addresses."""
        if (a % np.uint64(nb)).any():
            raise FaultError(f"misaligned {nb}-byte access: {self.at}")
        if space == "shared":
            if (a + np.uint64(nb) > self.shared_n).any():
                raise FaultError(f"shared address {int(a.max())} beyond {self.shared_n} bytes: {self.at}")
            return a.astype(np.int64), self.sviews, self.srace
        k = self.parameter = int(a[0] >> BUF_SHIFT)
        if k not in self.bufs:
            raise FaultError(f"wild global address {int(a[0]):#x}: {self.at}")
        b = self.bufs[k]
        off = a.astype(np.int64) - (k << int(BUF_SHIFT))
        if (off < b.off).any() or (off + nb > b.off + b.n).any():
            raise FaultError(
                f"out of bounds: byte {int(off.min()) - b.off}..{int(off.max()) + nb - b.off} of a {b.n}-byte buffer "
                f"(parameter {k - 1}): {self.at}"
            )
        return off, b.views, b.races

    def log(self, off, nb, m, races, how, space):
        lanes = self.all if m is None else np.nonzero(m)[0]
        if self.stats is not None and space == "global":
            s = self.stats.setdefault(how + ".global", dict(requests=0, sectors=0, bytes=0))
            key = (self.warp[lanes] << 40) | (off >> 5)
            s["requests"] += len(np.unique(self.warp[lanes]))
            s["sectors"] += len(np.unique(key if nb <= 32 else 0))
            s["bytes"] += nb * len(lanes)
            moved = self.stats.setdefault(how + ".parameter", {})
            moved[self.parameter - 1] = moved.get(self.parameter - 1, 0) + nb * len(lanes)
        if self.check_races:
            i = off[:, None] + np.arange(nb)
            getattr(races, how)(i, ((self.cta << 32) | (self.epoch << 8) | self.warp[lanes])[:, None], self.at)

    def read(self, a, size, vec, m, space):
        off, views, races = self.locate(a, size * vec, m, space)
        self.log(off, size * vec, m, races, "load", space)
        if space == "shared" and self.check_uninit and not self.sinit[off[:, None] + np.arange(size * vec)].all():
            raise FaultError(f"uninitialised shared memory is read: {self.at}")
        return views[size][off[:, None] // size + np.arange(vec)]

    def write(self, a, size, v, m, space):
        nb = size * v.shape[1]
        off, views, races = self.locate(a, nb, m, space)
        self.log(off, nb, m, races, "store", space)
        if space == "shared":
            self.sinit[off[:, None] + np.arange(nb)] = True
        idx = off[:, None] // size + np.arange(v.shape[1])
        views[size][idx] = v
        if (views[size][idx] != v).any():
            raise FaultError(f"lanes of one store write different values to one address: {self.at}")

    def ldst(self, mods):
        mods, ty = self.ty(mods)
        _, space, vec = self.mods(
            mods, HINTS, {"global", "shared", "shared::cta", "param", "const"}, {"v2", "v4", "v8"}
        )
        if space is None:
            raise UnknownError(f"{self.src}   (generic address)")
        return ty, space.split("::")[0], int(vec[1]) if vec else 1

    def i_ld(self, mods, ops):
        ty, space, vec = self.ldst(mods)
        size, ds = TYPES[ty][1] // 8, [self.dst(t, ty) for t in self.vec(ops[0])]
        if len(ds) != vec or len(ops) != 2:
            raise UnknownError(self.src)
        dt = TYPES[ty][2]
        if space == "param":
            nm, off = re.fullmatch(r"\[\s*([\w$]+)(?:\s*\+\s*(\d+))?\s*\]", ops[1]).groups()
            vs = [np.frombuffer(self.pv[nm], dt, 1, int(off or 0) + j * size)[0] for j in range(vec)]
            return lambda m: [self.put(d, v, m) for d, v in zip(ds, vs, strict=True)]
        addr = self.address(ops[1], 32 if space == "shared" else 64)

        def go(m):
            a = addr() if m is None else addr()[m]
            v = self.read(a, size, vec, m, space).view(dt)
            for j, d in enumerate(ds):
                d[slice(None) if m is None else m] = v[:, j]

        return go

    def i_st(self, mods, ops):
        ty, space, vec = self.ldst(mods)
        size, vs = TYPES[ty][1] // 8, [self.val(t, ty, loose=True) for t in self.vec(ops[1])]
        if len(vs) != vec or len(ops) != 2:
            raise UnknownError(self.src)
        addr = self.address(ops[0], 32 if space == "shared" else 64)

        def go(m):
            v = np.stack([np.broadcast_to(x(), self.n) for x in vs], 1)
            a = addr()
            if m is not None:
                a, v = a[m], v[m]
            self.write(a, size, np.ascontiguousarray(v).view(UINT[8 * size]), m, space)

        return go

    def i_atom(self, mods, ops, red=False):
        mods, ty = self.ty(mods) if mods[-1] in TYPES else self.ty([*mods[:-1], mods[-1]])
        _, space, fn = self.mods(
            mods,
            HINTS,
            {"global", "shared", "shared::cta"},
            {"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc"},
        )
        space, size = space.split("::")[0], TYPES[ty][1] // 8
        dt = TYPES[ty][2]
        if TYPES[ty][0] == "B" or np.dtype(dt).itemsize != size:
            raise UnknownError(self.src)
        d = None if red else self.dst(ops[0], ty)
        ops = ops if red else ops[1:]
        addr, b = self.address(ops[0], 32 if space == "shared" else 64), self.val(ops[1], ty)
        c = self.val(ops[2], ty) if fn == "cas" else None
        update = {
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
            "exch": lambda o, v: v,
            "inc": lambda o, v: dt(0) if o >= v else dt(o + 1),
        }

        def go(m):
            lanes = self.all if m is None else np.nonzero(m)[0]
            off, views, _ = self.locate(addr()[lanes], size, m, space)
            bb = np.broadcast_to(b(), self.n)[lanes]
            cc = np.broadcast_to(c(), self.n)[lanes] if c else bb
            mem, old = views[size].view(dt), np.empty(len(lanes), dt)
            for k in range(len(lanes)):
                i = off[k] // size
                o = old[k] = mem[i]
                mem[i] = (cc[k] if o == bb[k] else o) if fn == "cas" else update[fn](o, bb[k])
            if space == "shared":
                self.sinit[off[:, None] + np.arange(size)] = True
            if d is not None:
                d[lanes] = old

        return go

    def i_red(self, mods, ops):
        return self.i_atom(mods, ops, red=True)

    def i_ldmatrix(self, mods, ops, store=False):
        x, tr, *_ = self.mods(
            mods, {"x1", "x2", "x4"}, {"trans"}, {"sync"}, {"aligned"}, {"m8n8"}, {"shared", "shared::cta"}, {"b16"}
        )
        k = int(x[1])
        addr = self.address(ops[0 if store else 1], 32)
        regs = self.vec(ops[1 if store else 0])
        rs = [self.val(t, "b32") if store else self.dst(t, "b32") for t in regs]
        assert len(rs) == k

        def go(m):
            if m is not None:
                raise FaultError(f"not all lanes are here: {self.at}")
            a = addr().reshape(-1, 32)
            for j in range(k):  # matrix j: the row addresses are those of lanes 8j..8j+7
                rows, mm = a[:, 8 * j : 8 * j + 8].reshape(-1), (self.lane >= 8 * j) & (self.lane < 8 * j + 8)
                if store:
                    v = rs[j]().reshape(-1, 8, 4).copy().view(np.uint16)
                    if tr:
                        v = v.transpose(0, 2, 1)
                    self.write(rows, 2, np.ascontiguousarray(v).reshape(-1, 8), mm, "shared")
                else:
                    v = self.read(rows, 2, 8, mm, "shared").reshape(-1, 8, 8)
                    if tr:
                        v = v.transpose(0, 2, 1)
                    rs[j][...] = np.ascontiguousarray(v).view(np.uint32).reshape(-1)

        return go

    def i_stmatrix(self, mods, ops):
        return self.i_ldmatrix(mods, ops, store=True)

    # ---- data movement between lanes
    def members(self, mask, m):
        """Checks that all lanes of the member mask are active in every warp that executes this."""
        act = np.ones(self.n, bool) if m is None else m
        w = act.reshape(-1, 32)
        need = (np.broadcast_to(mask(), self.n).astype(np.int64) >> self.lane) & 1 == 1
        if ((need.reshape(-1, 32) & ~w) & w.any(1)[:, None]).any() or (act & ~need).any():
            raise FaultError(f"member mask and active lanes differ: {self.at}")
        return act

    def i_shfl(self, mods, ops):
        _, mode, _ = self.mods(mods, {"sync"}, {"up", "down", "bfly", "idx"}, {"b32"})
        d, *p = ops[0].split("|")
        d, p = self.dst(d, "b32"), self.dst(p[0], "pred") if p else None
        a, b, c, mask = (
            self.val(ops[1], "b32"),
            self.val(ops[2], "u32"),
            self.val(ops[3], "u32"),
            self.val(ops[4], "u32"),
        )

        def go(m):
            act = self.members(mask, m)
            bb, cc, lane = np.asarray(b()).astype(np.int64) & 31, np.asarray(c()).astype(np.int64), self.lane
            seg, cv = (cc >> 8) & 31, cc & 31
            hi, lo = (lane & seg) | (cv & ~seg), lane & seg
            j = {"up": lane - bb, "down": lane + bb, "bfly": lane ^ bb, "idx": lo | (bb & ~seg)}[mode]
            ok = j >= hi if mode == "up" else j <= hi
            s = self.warp * 32 + np.where(ok, j, lane)
            if (act & ~act[s]).any():
                raise FaultError(f"shuffle from an inactive lane: {self.at}")
            self.put(d, np.broadcast_to(a(), self.n)[s], m)
            if p is not None:
                self.put(p, ok, m)

        return go

    def i_redux(self, mods, ops):
        mods, ty = self.ty(mods)
        _, fn, nan = self.mods(mods, {"sync"}, {"add", "min", "max", "and", "or", "xor"}, {"NaN"})
        d, a, mask = self.dst(ops[0], ty), self.val(ops[1], ty), self.val(ops[2], "u32")
        if TYPES[ty][0] == "f":
            reduce = {"min": np.minimum if nan else np.fmin, "max": np.maximum if nan else np.fmax}[fn]
        else:
            reduce = {
                "add": np.add,
                "min": np.minimum,
                "max": np.maximum,
                "and": np.bitwise_and,
                "or": np.bitwise_or,
                "xor": np.bitwise_xor,
            }[fn]

        def go(m):
            w = self.members(mask, m).reshape(-1, 32)
            if not (w.all(1) | ~w.any(1)).all():
                raise UnknownError(f"redux of a part of a warp: {self.at}")
            self.put(
                d,
                np.repeat(reduce.reduce(np.broadcast_to(a(), self.n).reshape(-1, 32), axis=1, dtype=TYPES[ty][2]), 32),
                m,
            )

        return go

    def i_vote(self, mods, ops):
        _, fn, ty = self.mods(mods, {"sync"}, {"any", "all", "ballot"}, {"pred", "b32"})
        d, a, mask = self.dst(ops[0], ty), self.val(ops[1], "pred"), self.val(ops[2], "u32")

        def go(m):
            act = self.members(mask, m).reshape(-1, 32)
            v = np.broadcast_to(a(), self.n).reshape(-1, 32)
            r = {
                "any": lambda: (v & act).any(1),
                "all": lambda: (v | ~act).all(1),
                "ballot": lambda: ((v & act) << np.arange(32, dtype=np.int64)).sum(1),
            }[fn]()
            self.put(d, np.repeat(r, 32), m)

        return go

    def i_activemask(self, mods, ops):
        d = self.dst(ops[0], "b32")
        return lambda m: self.put(
            d,
            np.repeat(
                (np.ones((self.n // 32, 32), np.int64) if m is None else m.reshape(-1, 32).astype(np.int64))
                @ (1 << np.arange(32)),
                32,
            ),
            m,
        )

    # control flow (run acts on bra, ret and bar)
    def i_bra(self, mods, ops):
        self.mods(mods, {"uni"})
        return ("bra", self.p.labels[ops[0]])

    def i_ret(self, mods, ops):
        self.mods(mods, {"uni"})
        return ("exit",)

    def i_exit(self, mods, ops):
        self.mods(mods)
        return ("exit",)

    def i_trap(self, mods, ops):
        return ("trap",)

    def i_bar(self, mods, ops):
        if mods == ["warp", "sync"]:
            return lambda m: None
        self.mods(mods, {"sync"}, {"cta"}, {"aligned"})
        if (mods[:1] != ["sync"] and mods[:2] != ["cta", "sync"]) or (len(ops) > 1 and int(ops[1], 0) != self.n):
            raise UnknownError(self.src)
        return ("bar",)

    i_barrier = i_bar

    def i_fence(self, mods, ops):
        return lambda m: None

    i_membar = i_griddepcontrol = i_nanosleep = i_fence

    # ---- arithmetic
    def fn(self, ty, ops, f, out=None, approx=False, ftz=False):
        d, a = self.dst(ops[0], out or ty), [self.val(o, ty) for o in ops[1:]]
        dt = TYPES[out or ty][2]
        if ftz:
            tiny = np.finfo(dt).tiny

            def flush(v):
                return np.where(np.abs(v) < tiny, np.copysign(dt(0), v), v)

        def go(m):
            v = [x() for x in a]
            if ftz:
                v = [flush(x) for x in v]
            r = f(*v)
            if approx and self.ulp:  # the same operands give the same error in every lane, as on a GPU
                h = (
                    np.ascontiguousarray(np.broadcast_to(r, d.shape)).view(UINT[8 * dt().itemsize]).astype(np.uint64)
                    * np.uint64(0x9E3779B97F4A7C15)
                    + self.salt
                )
                r = (
                    r
                    + (((h >> np.uint64(40)) % np.uint64(2 * self.ulp + 1)).astype(np.int64) - self.ulp) * np.spacing(r)
                ).astype(dt)
            self.put(d, flush(r) if ftz else r, m)

        return go

    def arith(self, mods, ops, ints, flts, extra=(), preds=None):
        mods, ty = self.ty(mods)
        k = TYPES[ty][0]
        table = {"f": flts, "p": preds}.get(k, ints)
        if k == "B" or table is None:
            raise UnknownError(self.src)
        if k != "f":
            self.mods(mods, *extra)
            return self.fn(ty, ops, table)
        _, ftz, *_ = self.mods(mods, {"rn"}, {"ftz"}, *extra)
        if ftz and ty != "f32":
            raise UnknownError(self.src)
        return self.fn(ty, ops, table, ftz=bool(ftz))

    def i_add(self, mods, ops):
        return self.arith(mods, ops, np.add, np.add)

    def i_sub(self, mods, ops):
        return self.arith(mods, ops, np.subtract, np.subtract)

    def i_neg(self, mods, ops):
        return self.arith(mods, ops, lambda a: (~a) + a.dtype.type(1), np.negative)

    def i_abs(self, mods, ops):
        rest, ty = self.ty(mods)
        if TYPES[ty][0] == "B":  # the sign bit, of both halves of a pair
            self.mods(rest)
            pair = ty == "bf16x2"
            return self.fn("b32" if pair else "b16", ops, lambda a: a & a.dtype.type(0x7FFF7FFF if pair else 0x7FFF))
        return self.arith(mods, ops, np.abs, np.abs)

    def i_min(self, mods, ops):
        if "NaN" in mods:
            return self.arith([x for x in mods if x != "NaN"], ops, None, np.minimum)
        return self.arith(mods, ops, np.minimum, fmin)

    def i_max(self, mods, ops):
        if "NaN" in mods:
            return self.arith([x for x in mods if x != "NaN"], ops, None, np.maximum)
        return self.arith(mods, ops, np.maximum, fmax)

    def i_and(self, mods, ops):
        return self.arith(mods, ops, np.bitwise_and, None, preds=np.logical_and)

    def i_or(self, mods, ops):
        return self.arith(mods, ops, np.bitwise_or, None, preds=np.logical_or)

    def i_xor(self, mods, ops):
        return self.arith(mods, ops, np.bitwise_xor, None, preds=np.logical_xor)

    def i_not(self, mods, ops):
        return self.arith(mods, ops, np.bitwise_not, None, preds=np.logical_not)

    def i_mul(self, mods, ops, add=False):
        mods, ty = self.ty(mods)
        k, w, dt = TYPES[ty]
        if k == "f":
            if add:
                raise UnknownError(self.src)
            return self.arith([*mods, ty], ops, None, np.multiply)
        (how,) = self.mods(mods, {"lo", "hi", "wide"})
        out = f"{k}{2 * w}" if how == "wide" else ty
        big = TYPES[out][2] if how == "wide" else dt

        def f(a, b, c=None):
            if how == "hi" and w == 64:
                r = mulhi64(np.broadcast_to(a, self.n), np.broadcast_to(b, self.n), k == "s")
            elif how == "hi":
                r = ((np.asarray(a, TYPES[f"{k}{2 * w}"][2]) * b) >> w).astype(dt)
            else:
                r = np.asarray(a, big) * np.asarray(b, big)
            return r if c is None else r + c

        if not add:
            return self.fn(ty, ops, f, out)
        d, a, b, c = self.dst(ops[0], out), self.val(ops[1], ty), self.val(ops[2], ty), self.val(ops[3], out)
        return lambda m: self.put(d, f(a(), b(), c()), m)

    def i_mad(self, mods, ops):
        return self.i_fma(mods, ops) if TYPES[mods[-1]][0] == "f" else self.i_mul(mods, ops, add=True)

    def i_fma(self, mods, ops):
        fma = {"f32": fma32, "f32x2": fma32, "f64": fma64}[mods[-1]]
        if "rn" not in mods:
            raise UnknownError(self.src)
        n = self.n * (2 if mods[-1] == "f32x2" else 1)
        return self.arith(mods, ops, None, lambda a, b, c: fma(np.broadcast_to(a, n), b, c))

    def i_div(self, mods, ops, rem=False):
        mods, ty = self.ty(mods)
        if TYPES[ty][0] != "f":
            self.mods(mods)
            return self.fn(ty, ops, lambda a, b: idivrem(np.asarray(a), np.asarray(b), rem))
        how, ftz = self.mods(mods, {"rn", "full", "approx"}, {"ftz"})
        return self.fn(ty, ops, np.divide, approx=how != "rn", ftz=bool(ftz))

    def i_rem(self, mods, ops):
        return self.i_div(mods, ops, rem=True)

    def unary(self, f):
        def dec(mods, ops):
            mods, ty = self.ty(mods, "f")
            how, ftz = self.mods(mods, {"rn", "approx"}, {"ftz"})
            g = (lambda x: f(np.asarray(x, np.float64)).astype(TYPES[ty][2])) if ty == "f32" else f
            return self.fn(ty, ops, g, approx=how != "rn", ftz=bool(ftz))

        return dec

    i_sqrt = property(lambda s: s.unary(np.sqrt))
    i_rsqrt = property(lambda s: s.unary(lambda x: 1 / np.sqrt(x)))
    i_rcp = property(lambda s: s.unary(lambda x: 1 / x))
    i_ex2 = property(lambda s: s.unary(np.exp2))
    i_lg2 = property(lambda s: s.unary(np.log2))
    i_sin = property(lambda s: s.unary(np.sin))
    i_cos = property(lambda s: s.unary(np.cos))
    i_tanh = property(lambda s: s.unary(np.tanh))

    def i_copysign(self, mods, ops):
        return self.fn(self.ty(mods, "f")[1], ops, lambda a, b: np.copysign(b, a))

    def shift(self, mods, ops, f):
        mods, ty = self.ty(mods, "bus")
        self.mods(mods)
        w, dt, d, a, b = TYPES[ty][1], TYPES[ty][2], self.dst(ops[0], ty), self.val(ops[1], ty), self.val(ops[2], "u32")

        def go(m):
            x, s = a(), np.asarray(b())
            r = f(x, np.minimum(s, w - 1).astype(dt))
            self.put(
                d, np.where(s >= w, 0, r).astype(dt) if not (f is np.right_shift and TYPES[ty][0] == "s") else r, m
            )

        return go

    def i_shl(self, mods, ops):
        return self.shift(mods, ops, np.left_shift)

    def i_shr(self, mods, ops):
        return self.shift(mods, ops, np.right_shift)

    def i_shf(self, mods, ops):
        dr, how, _ = self.mods(mods, {"l", "r"}, {"wrap", "clamp"}, {"b32"})

        def f(a, b, c):
            v = np.asarray(a, np.uint64) | (np.asarray(b, np.uint64) << np.uint64(32))
            n = (
                np.asarray(c, np.uint64) & np.uint64(31)
                if how == "wrap"
                else np.minimum(np.asarray(c, np.uint64), np.uint64(32))
            )
            return ((v << n) >> np.uint64(32) if dr == "l" else v >> n).astype(np.uint32)

        return self.fn("b32", ops, f)

    def i_bfe(self, mods, ops):
        mods, ty = self.ty(mods, "us")
        self.mods(mods)
        w, dt, d, a, b, c = (
            TYPES[ty][1],
            TYPES[ty][2],
            self.dst(ops[0], ty),
            self.val(ops[1], ty),
            self.val(ops[2], "u32"),
            self.val(ops[3], "u32"),
        )

        def go(m):
            p, ln = int(np.max(b())) & 255, int(np.max(c())) & 255
            if np.ndim(b()) or np.ndim(c()) or p + ln > w or ln == 0:
                raise UnknownError(f"bfe beyond the word or of a varying place: {self.at}")
            self.put(d, np.right_shift(np.left_shift(np.broadcast_to(a(), self.n), dt(w - p - ln)), dt(w - ln)), m)

        return go

    def i_bfi(self, mods, ops):
        mods, ty = self.ty(mods, "b")
        self.mods(mods)
        dt, p, ln = TYPES[ty][2], int(ops[3], 0), int(ops[4], 0)
        if p + ln > TYPES[ty][1]:
            raise UnknownError(self.src)
        k = ((1 << ln) - 1) << p
        return self.fn(
            ty, ops[:3], lambda a, b: (np.left_shift(a, dt(p)) & dt(k)) | (b & dt(k ^ ((1 << TYPES[ty][1]) - 1)))
        )

    def i_popc(self, mods, ops):
        return self.fn(mods[0], ops, lambda a: np.bitwise_count(a), "u32")

    def i_clz(self, mods, ops):
        w = TYPES[mods[0]][1]
        return self.fn(
            mods[0], ops, lambda a: w - np.array([int(x).bit_length() for x in np.broadcast_to(a, self.n)]), "u32"
        )

    def i_brev(self, mods, ops):
        return self.fn(
            mods[0],
            ops,
            lambda a: np.array(
                [int(f"{int(x):0{TYPES[mods[0]][1]}b}"[::-1], 2) for x in np.broadcast_to(a, self.n)], np.uint64
            ),
        )

    def i_lop3(self, mods, ops):
        self.mods(mods, {"b32"})
        t = int(ops[4], 0)

        def f(*v):
            r = np.uint32(0)
            for k in range(8):
                if t >> k & 1:
                    r = r | np.bitwise_and.reduce(
                        [np.broadcast_to(x if k >> (2 - j) & 1 else ~x, self.n) for j, x in enumerate(v)]
                    )
            return r

        return self.fn("b32", ops[:4], f)

    def i_prmt(self, mods, ops):
        self.mods(mods, {"b32"})

        def f(a, b, c):
            v, r = np.asarray(a, np.uint64) | (np.asarray(b, np.uint64) << np.uint64(32)), np.uint32(0)
            for k in range(4):
                s = (np.asarray(c, np.uint64) >> np.uint64(4 * k)) & np.uint64(15)
                x = (v >> ((s & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
                x = np.where(s & np.uint64(8), np.where(x >> np.uint64(7), 255, 0), x)
                r = r | (x.astype(np.uint32) << np.uint32(8 * k))
            return r

        return self.fn("b32", ops, f)

    def i_setp(self, mods, ops):
        mods, ty = self.ty(mods)
        kind = TYPES[ty][0]
        cmp, bop, ftz = self.mods(
            mods,
            set(CMP) | {"num", "nan"} | {c + "u" for c in ("eq", "ne", "lt", "le", "gt", "ge")},
            {"and", "or", "xor"},
            set() if kind not in "fB" else {"ftz"},
        )
        if kind not in "fBbus" or (kind not in "fB" and cmp not in CMP) or (kind == "B" and ftz):
            raise UnknownError(self.src)
        d, *q = ops[0].split("|")
        d, q = self.dst(d, "pred"), self.dst(q[0], "pred") if q else None
        packed = ty in (
            "f16x2",
            "bf16x2",
        )  # low halves into the first predicate, high into the second
        if ty == "f32x2" or (packed and (q is None or not {*ops[1:3]} <= self.where.keys())):
            raise UnknownError(self.src)
        a, b, c = self.val(ops[1], ty), self.val(ops[2], ty), self.val(ops[3], "pred") if bop else None
        combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, None: None}[bop]
        tiny = np.finfo(np.float32).tiny

        def go(m):
            x, y = a(), b()
            if kind == "B":
                x, y = bf16_to_f32(x), bf16_to_f32(y)
            if ftz:
                x, y = (np.where(np.abs(v) < tiny, np.copysign(np.float32(0), v), v) for v in (x, y))
            if kind in "fB":
                un = np.isnan(x) | np.isnan(y)
                r = (
                    un
                    if cmp == "nan"
                    else ~un
                    if cmp == "num"
                    else CMP[cmp](x, y) & ~un
                    if cmp in CMP
                    else CMP[cmp[:-1]](x, y) | un
                )
            else:
                r = CMP[cmp](x, y)
            cv = c().copy() if combine else None
            first, second = (r[0::2], r[1::2]) if packed else (r, ~r)
            self.put(d, combine(first, cv) if combine else first, m)
            if q is not None:
                self.put(q, combine(second, cv) if combine else second, m)

        return go

    def i_selp(self, mods, ops):
        mods, ty = self.ty(mods)
        self.mods(mods)
        d, a, b, c = self.dst(ops[0], ty), self.val(ops[1], ty), self.val(ops[2], ty), self.val(ops[3], "pred")
        return lambda m: self.put(d, np.where(c(), a(), b()), m)

    def i_mov(self, mods, ops):
        mods, ty = self.ty(mods)
        self.mods(mods)
        w = TYPES[ty][1]
        if "{" not in ops[0] + ops[1]:
            d, a = self.dst(ops[0], ty), self.val(ops[1], ty)
            return lambda m: self.put(d, a(), m)
        parts = self.vec(ops[0] if "{" in ops[0] else ops[1])
        pw = w // len(parts)
        if ops[0].startswith("{"):
            a, ds = self.val(ops[1], f"b{w}"), [self.dst(t, f"b{pw}") for t in parts]

            def go(m):
                v = np.ascontiguousarray(np.broadcast_to(a(), self.n)).view(UINT[pw]).reshape(self.n, -1).copy()
                for j, d in enumerate(ds):
                    self.put(d, v[:, j], m)
        else:
            d, vs = self.dst(ops[0], f"b{w}"), [self.val(t, f"b{pw}") for t in parts]

            def go(m):
                self.put(
                    d,
                    np.ascontiguousarray(np.stack([np.broadcast_to(v(), self.n) for v in vs], 1)).view(UINT[w])[:, 0],
                    m,
                )

        return go

    def i_cvta(self, mods, ops):
        self.mods(mods, {"to"}, {"global"}, {"u64"})
        return self.i_mov(["b64"], ops)

    def i_cvt(self, mods, ops):
        st, mods = mods[-1], mods[:-1]
        dt_, mods = mods[-1], mods[:-1]
        (dk, dw, dt), (sk, sw, _sdt) = TYPES[dt_], TYPES[st]
        rnd, ftz, sat = self.mods(mods, {"rn", "rz", "rm", "rp", "rzi", "rni", "rmi", "rpi"}, {"ftz"}, {"sat"})
        if (ftz and "f32" not in (dt_, st)) or sat:
            raise UnknownError(self.src)
        rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
        d, a = self.dst(ops[0], dt_), [self.val(o, st, loose=True) for o in ops[1:]]
        tiny = np.finfo(np.float32).tiny
        flush = (lambda v: np.where(np.abs(v) < tiny, np.copysign(np.float32(0), v), v)) if ftz else (lambda v: v)
        if dt_ in ("bf16x2", "f16x2"):  # cvt.rn.bf16x2.f32 d, high, low
            if st != "f32" or rnd != "rn" or len(a) != 2:
                raise UnknownError(self.src)
            h = f32_to_bf16 if dk == "B" else lambda v: v.astype(np.float16).view(np.uint16)
            d32 = self.dst(ops[0], "b32")
            return lambda m: self.put(
                d32,
                (h(np.broadcast_to(a[0](), self.n)).astype(np.uint32) << np.uint32(16))
                | h(np.broadcast_to(a[1](), self.n)),
                m,
            )
        (a,) = a
        if sk == "B" or dk == "B":
            if (st, dt_, rnd) == ("bf16", "f32", None):
                f = bf16_to_f32
            elif (st, dt_, rnd) == ("bf16", "f64", None):

                def f(v):
                    return bf16_to_f32(v).astype(np.float64)
            elif (st, dt_, rnd) == ("f32", "bf16", "rn"):
                f = f32_to_bf16
            else:
                raise UnknownError(self.src)
        elif sk == "f" and dk in "su":
            lo, hi, r = (
                (-(2 ** (dw - 1)), 2 ** (dw - 1) - 1, rounding[rnd]) if dk == "s" else (0, 2**dw - 1, rounding[rnd])
            )

            def f(v):
                x = r(flush(v)).astype(np.float64)
                return np.array(
                    [0 if t != t else hi if t >= hi else lo if t <= lo else int(t) for t in np.atleast_1d(x).tolist()],
                    np.int64 if dk == "s" else np.uint64,
                ).astype(dt)
        elif sk == "f" and dk == "f":
            if rnd in rounding:

                def f(v):
                    return rounding[rnd](v).astype(dt)
            elif rnd in (None, "rn") and (dw >= sw or rnd == "rn"):

                def f(v):
                    return flush(np.asarray(flush(v) if st == "f32" else v).astype(dt))
            else:
                raise UnknownError(self.src)
        elif dk == "f":
            if rnd != "rn" or sk not in "su":
                raise UnknownError(self.src)

            def f(v):
                return np.asarray(v).astype(dt)
        else:
            if rnd:
                raise UnknownError(self.src)

            def f(v):
                return np.asarray(v).astype(dt)  # the source's sign extends, the destination wraps

        return lambda m: self.put(d, f(a()), m)

    # ---- running one CTA
    def run(self, ctaid, number, max_steps):
        n = self.n
        for w in (16, 32, 64):
            self.R[w].fill(POISON[w])
        self.R[1].fill(False)
        for ax, v in zip("xyz", ctaid, strict=True):
            self.special[f"%ctaid.{ax}"].fill(v)
        self.sinit.fill(False)
        self.srace.w.fill(-1)
        self.srace.r.fill(-1)
        self.cta, self.epoch, steps = number, 0, 0
        alive, pcs, waiting, pc, split = np.ones(n, bool), np.zeros(n, np.int64), np.zeros(n, bool), 0, False
        base = None  # active lanes; None: all
        while True:
            if split:  # diverged: the lowest program counter goes first
                run = alive & ~waiting
                if not run.any():
                    if not alive.any():
                        return steps
                    if len(set(pcs[alive].tolist())) != 1:
                        raise FaultError("threads wait at different barriers")
                    waiting[:] = False
                    pcs[alive] += 1
                    self.epoch += 1
                    continue
                pc = int(pcs[run].min())
                base = run & (pcs == pc)
                if not waiting.any() and (base == alive).all():
                    split, base = False, None if alive.all() else alive.copy()
            g, neg, act, op, self.at = self.code[pc]
            steps += 1
            if steps > max_steps:
                raise FaultError(f"more than {max_steps} steps: {self.at}")
            if self.stats is not None:
                self.stats["ops"][op] = self.stats["ops"].get(op, 0) + 1
            m = base
            if g is not None:
                m = (~g if neg else g).copy()
                if base is not None:
                    m &= base
                if m.all():
                    m = None
                elif not m.any():
                    if split:
                        pcs[base] += 1
                    else:
                        pc += 1
                    continue
            if not isinstance(act, tuple):
                act(m)
                if split:
                    pcs[base] += 1
                else:
                    pc += 1
                continue
            here = np.ones(n, bool) if m is None else m
            whole = bool((here == (alive if base is None else base)).all())
            if act[0] == "trap":
                raise FaultError("trap")
            if not split and not whole:
                pcs[:] = pc
                split, base = True, alive.copy()
            if not split:
                if act[0] == "exit":
                    return steps
                if act[0] == "bra":
                    pc = act[1]
                else:
                    pc += 1
                    self.epoch += 1
                continue
            pcs[base] += 1
            if act[0] == "exit":
                alive &= ~here
            elif act[0] == "bra":
                pcs[here] = act[1]
            else:
                waiting |= here
                pcs[here] = pc


def launch(
    ptx,
    grid,
    args,
    block=None,
    shared=0,
    check_races=True,
    check_uninit=True,
    order=None,
    approx_ulp=0,
    seed=0,
    stats=False,
    max_steps=5_000_000,
):
    """Runs every CTA of the grid, x fastest (order="random": in a random order).

    Returns the statistics; with stats=True those by opcode, by memory sector, and the bytes by parameter too.
    """
    prog = ptx if isinstance(ptx, Program) else Program(ptx)
    grid = tuple(grid) + (1,) * (3 - len(tuple(grid)))
    block = tuple(block) + (1,) * (3 - len(tuple(block))) if block else prog.reqntid
    st = dict(ops={}) if stats else None
    b = Block(prog, block, grid, args, shared, check_races, check_uninit, approx_ulp, seed, st)
    ids = np.arange(int(np.prod(grid)))
    if order == "random":
        np.random.default_rng(seed).shuffle(ids)
    steps = 0
    with np.errstate(all="ignore"):
        for i in ids.tolist():
            steps += b.run((i % grid[0], i // grid[0] % grid[1], i // (grid[0] * grid[1])), i, max_steps)
    for buf in b.bufs.values():
        buf.back()
    return dict(st or {}, steps=steps)
