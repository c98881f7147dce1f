"""The analysis of PTX and machine code, on known code; and the PTX that the sources need."""

import re
import subprocess

import pytest

from exl_loader.backends.build.build import build_entry
from exl_loader.backends.cuda.arch import COMMON, OLDEST_CUDA, arch_name
from exl_loader.backends.cuda.compilers import cuda_spec
from exl_loader.backends.cuda.nvrtc_cc import NvrtcError
from exl_loader.utils.errors import KernelBuildError
from support import ptx
from support.cuda_ptx_table import CUDA_OF, since
from support.cuda_sources import REPO, KeepingNvrtc, cuda_compiler, traps_of

CSRC = REPO / "csrc"


# ---- Instructions that the sources write -------------------------------------------------------


def written_opcodes():
    """Return the opcodes of the sources' inline PTX; a macro's parameter matches any type."""
    found = set()
    for path in sorted((CSRC / "cuda").glob("*.cu*")):
        statements = re.findall(
            r"asm\s*(?:volatile)?\s*\(\s*((?:\"[^\"]*\"|\w+|\s)+)", path.read_text()
        )
        for text in statements:
            whole = "".join(
                part.strip('"') if part.startswith('"') else "any"
                for part in re.findall(r'"[^"]*"|\w+', text)
            )
            found.add(re.match(r"[\w.:]+", whole)[0])
    return found


def test_every_instruction_is_in_the_table():
    opcodes = written_opcodes()
    assert len(opcodes) > 20
    assert [opcode for opcode in sorted(opcodes) if since(opcode) is None] == []


def test_the_oldest_toolkit_has_every_instruction():
    newest = max(since(opcode)[0] for opcode in written_opcodes())
    assert CUDA_OF[newest] == OLDEST_CUDA


# ---- Mistakes that compilers refuse ------------------------------------------------------------

SHARED = """
namespace exl {
%s
}
extern "C" __global__ void __launch_bounds__(32) kernel(int* p) { p[0] = exl::value(p[1]); }
"""


@pytest.fixture
def compile_mistake(compiler, tmp_path):
    """Compile a kernel that uses a header of the CPU."""

    def run(shared):
        root = tmp_path / "sources"
        (root / "cuda" / "nvrtc").mkdir(parents=True, exist_ok=True)
        (root / "cuda" / "kernel.cu").write_text(SHARED % shared)
        return build_entry(cuda_spec((8, 6), compiler=compiler, root=root))

    return run


def test_functions_of_the_cpu_are_refused(compile_mistake, monkeypatch, tmp_path):
    monkeypatch.setenv("EXL_LOADER_CACHE_DIR", str(tmp_path / "a cache"))
    with pytest.raises(KernelBuildError) as caught:
        compile_mistake("constexpr int value(int i) { return 3 * i; }")
    assert "host" in caught.value.details and "value" in caught.value.details


@pytest.mark.parametrize("how", ["table", "member"])
def test_tables_of_the_cpu_are_refused_or_compiled_right(compile_mistake, monkeypatch, tmp_path,
                                                        compiler, how):
    """nvcc refuses them. NVRTC compiles for no CPU, so they become the device's."""
    monkeypatch.setenv("EXL_LOADER_CACHE_DIR", str(tmp_path / "a cache"))
    shared = {
        "table": "constexpr int kTable[] = {5, 6, 7};\n"
                 "__host__ __device__ constexpr int value(int i) { return kTable[i]; }",
        "member": "struct Table { static constexpr int kAll[] = {5, 6, 7}; };\n"
                  "__host__ __device__ constexpr int value(int i) { return Table::kAll[i]; }",
    }[how]
    if compiler.compiler.kind == "nvcc":
        with pytest.raises(KernelBuildError, match="EXL_LOADER_CUDA_COMPILER") as caught:
            compile_mistake(shared)
        assert "undefined in device code" in caught.value.details
    else:
        (path,) = compile_mistake(shared).files
        assert traps_of(path.read_bytes()) == {"kernel": 0}


# ---- Traps in machine code ---------------------------------------------------------------------

TRAPPING = """
extern "C" __global__ void trapping(int* p) { if (p[0]) __trap(); p[1] = 3; }
extern "C" __global__ void good(int* p) { p[1] = 0x95C; }
"""


@pytest.mark.parametrize("capability", COMMON, ids=arch_name)
def test_traps_are_seen(compiler, capability, tmp_path):
    source = tmp_path / "trap.cu"
    source.write_text(TRAPPING)
    spec = cuda_spec(capability, compiler=compiler)
    if compiler.compiler.kind == "nvrtc":
        nvrtc = KeepingNvrtc(compiler.path)
        cubin, _ = nvrtc.compile(TRAPPING.encode(), "trap.cu", list(spec.flags))
        names = {kernel.name: {i.name for i in kernel.instructions()}
                 for kernel in ptx.parse(nvrtc.ptx).kernels}
        assert "trap" in names["trapping"] and "trap" not in names["good"]
    else:
        target = tmp_path / "trap.cubin"
        subprocess.run([*compiler.compiler.command, *spec.flags, str(source), "-o", str(target)],
                       check=True)
        cubin = target.read_bytes()
    assert traps_of(cubin) == {"trapping": 1, "good": 0}


# ---- Registers and barriers --------------------------------------------------------------------

KERNEL = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 kernel_param_0, .param .align 8 .b8 kernel_param_1[24])
.maxntid 128, 1, 1
{
    .reg .pred %p<4>; .reg .b32 %r<8>; .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [kernel_param_0];
    ld.global.u32 %r4, [%rd1]; // a number, the same in all threads
    mov.u32 %r1, %tid.x;
    BODY
    ret;
}
"""


def kernel_of(body):
    (kernel,) = ptx.parse(KERNEL.replace("BODY", body)).kernels
    return kernel


def test_kernels_are_parsed():
    kernel = kernel_of("@%p1 bra $L__BB0_2;\n$L__BB0_2:\n@!%p2 st.global.u32 [%rd1+4], %r1;")
    assert kernel.name == "kernel" and kernel.directives["maxntid"].startswith("128")
    assert kernel.parameters == [("u64", ""), ("b8", "24")]
    guarded = [i for i in kernel.instructions() if i.guard]
    assert [(i.guard, i.name, i.read()) for i in guarded] == [
        ("%p1", "bra", ["%p1"]), ("%p2", "st", ["%p2", "%rd1", "%r1"]),
    ]


@pytest.mark.parametrize(("body", "is_set"), [
    ("add.s32 %r2, %r1, 1; st.global.u32 [%rd1], %r2;", True),
    ("add.s32 %r2, %r3, 1;", False),
    # Set on one of two paths, on both, and in a loop that may not run.
    ("setp.eq.s32 %p1, %r1, 0; @%p1 bra $A; mov.u32 %r3, 1;\n$A: add.s32 %r2, %r3, 1;", False),
    ("setp.eq.s32 %p1, %r1, 0; @%p1 bra $A; mov.u32 %r3, 1; bra $B;\n$A: mov.u32 %r3, 2;\n"
     "$B: add.s32 %r2, %r3, 1;", True),
    ("setp.eq.s32 %p1, %r1, 0; @%p1 bra $B;\n$A: mov.u32 %r3, 1; setp.eq.s32 %p2, %r4, 0; "
     "@%p2 bra $A;\n$B: add.s32 %r2, %r3, 1;", False),
    # A guarded instruction may set nothing; operands in braces.
    ("setp.eq.s32 %p1, %r1, 0; @%p1 mov.u32 %r3, 1; add.s32 %r2, %r3, 1;", False),
    ("ld.global.v2.u32 {%r2, %r3}, [%rd1]; st.global.v2.u32 [%rd1], {%r3, %r2};", True),
    ("st.global.v2.u32 [%rd1], {%r1, %r2};", False),
    # The upper half of a pair counts even if nothing takes it.
    ("mov.b64 %rd2, {%r1, %r2}; mov.b64 {%r3, _}, %rd2;", False),
])  # fmt: skip
def test_reads_of_unset_registers_are_found(body, is_set):
    assert (ptx.unset_reads(kernel_of(body)) == []) == is_set


@pytest.mark.parametrize(("body", "is_reached"), [
    ("bar.sync 0;", True),
    # All threads of a block have the same block number; values loaded by thread number differ.
    ("setp.eq.s32 %p1, %r4, 0; @%p1 bra $A; bar.sync 0;\n$A: mov.u32 %r2, 1;", True),
    ("setp.lt.s32 %p1, %r1, 5; @%p1 bra $A; bar.sync 0;\n$A: mov.u32 %r2, 1;", False),
    ("setp.lt.s32 %p1, %r1, 32; @%p1 bra $A; bar.sync 0;\n$A: mov.u32 %r2, 1;", False),
    ("mul.wide.u32 %rd2, %r1, 4; ld.global.u32 %r2, [%rd2]; setp.eq.s32 %p1, %r2, 0; "
     "@%p1 bra $A; bar.sync 0;\n$A: mov.u32 %r2, 1;", False),
    # Threads on different paths meet again; a thread that has exited does not.
    ("setp.lt.s32 %p1, %r1, 5; @%p1 bra $A; mov.u32 %r2, 1;\n$A: bar.sync 0;", True),
    ("setp.lt.s32 %p1, %r1, 5; @%p1 bra $A; ret;\n$A: bar.sync 0;", False),
    # A loop of different lengths, and a number that was set on one path only.
    ("mov.u32 %r2, %r1;\n$A: bar.sync 0; add.s32 %r2, %r2, -1; setp.gt.s32 %p1, %r2, 0; "
     "@%p1 bra $A;", False),
    ("mov.u32 %r2, 0; setp.lt.s32 %p1, %r1, 5; @%p1 bra $A; mov.u32 %r2, 1;\n"
     "$A: setp.eq.s32 %p2, %r2, 0; @%p2 bra $B; bar.sync 0;\n$B: mov.u32 %r3, 1;", False),
    ("vote.sync.ballot.b32 %r2, %p1, -1; setp.eq.s32 %p1, %r2, 0; @%p1 bra $A; bar.sync 0;\n"
     "$A: mov.u32 %r3, 1;", False),
    ("setp.lt.s32 %p1, %r1, 5; @%p1 bra $A; bar.warp.sync -1;\n$A: mov.u32 %r2, 1;", True),
])  # fmt: skip
def test_barriers_that_some_threads_do_not_reach_are_found(body, is_reached):
    assert (ptx.divergent_barriers(kernel_of(body)) == []) == is_reached


def test_a_compiled_mistake_is_found():
    """A mistake that the analysis must find, in code from a compiler."""
    found = cuda_compiler("nvrtc")
    if found is None:
        pytest.skip("no NVRTC")
    source = """
extern "C" __global__ void __launch_bounds__(64) kernel(const float* in, float* out) {
    __shared__ float rows[64];
    rows[threadIdx.x] = in[threadIdx.x];
    if (threadIdx.x < LIMIT) __syncthreads();
    out[threadIdx.x] = rows[63 - threadIdx.x];
}"""
    for limit, count in (("40", 1), ("in[0]", 0)):
        nvrtc = KeepingNvrtc(found.path)
        nvrtc.compile(source.replace("threadIdx.x < LIMIT", f"{limit} > threadIdx.x" if count
                                     else f"{limit} > 3").encode(), "k.cu",
                      ["--gpu-architecture=sm_86", "-std=c++17"])
        (kernel,) = ptx.parse(nvrtc.ptx).kernels
        assert len(ptx.divergent_barriers(kernel)) == count
        assert ptx.unset_reads(kernel) == []
    with pytest.raises(NvrtcError):
        nvrtc.compile(b"int f() { return 1; }", "k.cu", ["--gpu-architecture=sm_86"])
