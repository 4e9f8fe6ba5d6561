# Shared by the launchers `perturbnas`, `test` and `.ci/run`, which source it: brings the native build tools where they are missing
# and builds a project when its sources have changed. Everything it says goes to stderr, so that stdout stays the program's own.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
export DOTNET_CLI_TELEMETRY_OPTOUT=1 DOTNET_NOLOGO=1 DOTNET_SKIP_FIRST_TIME_EXPERIENCE=1 DOTNET_GENERATE_ASPNET_CERTIFICATE=false
# Without ICU (a bare Debian has none) the SDK runs only in invariant mode; the program itself always does.
export DOTNET_CLI_WORKLOAD_UPDATE_NOTIFY_DISABLE=true DOTNET_SYSTEM_GLOBALIZATION_INVARIANT=1

say() { printf '%s\n' "$*" >&2; }

# fail SENTENCE...: something that the user has to put right.
fail() {
  say "perturbnas: $*"
  exit 2
}

# install PACKAGE...: with apt-get, as root or by passwordless sudo; otherwise names the command and ends the program.
install() {
  local as_root=()
  command -v apt-get >/dev/null || fail "please install $* (Debian's package names) and start again."
  if [ "$(id -u)" != 0 ]; then
    as_root=(sudo -n)
    sudo -n true 2>/dev/null ||
      fail "please run 'sudo apt-get install --no-install-recommends $*' and start again; these packages are missing here."
  fi
  say "perturbnas: installing $* with apt-get, once..."
  local apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=600) log=$root/build/install.log
  : >"$log"
  # Package lists that are missing or too old both show up as a failing install.
  if ! compgen -G '/var/lib/apt/lists/*_Packages*' >/dev/null ||
    ! "${apt[@]}" install -y --no-install-recommends "$@" >>"$log" 2>&1 </dev/null; then
    { "${apt[@]}" update && "${apt[@]}" install -y --no-install-recommends "$@"; } >>"$log" 2>&1 </dev/null || {
      tail -n 30 "$log" >&2
      fail "apt-get could not install $*; its last lines are above, all of them are in $log."
    }
  fi
}

install_build_tools() {
  local missing=()
  command -v cmake >/dev/null || missing+=(cmake)
  command -v make >/dev/null || missing+=(make)
  command -v g++ >/dev/null || missing+=(g++)
  [ ${#missing[@]} = 0 ] || install "${missing[@]}"
}

# How much of CUDA the arguments ask for: 2, the emulated device (its driver and the kernels); 1, the kernels, also where the machine has an
# NVIDIA driver; 0, nothing, which spares the CPU path a compiler.
cuda_wanted() {
  local argument wanted=0
  { [ -e /dev/nvidiactl ] || [ -e /dev/dxg ]; } && wanted=1
  for argument in "$@" "${PERTURBNAS_DEVICE:-}"; do
    case ${argument#--device=} in
      cuda) wanted=1 ;;
      cuda-emulated) wanted=2 ;;
    esac
  done
  printf %s $wanted
}

# What CMakeLists.txt takes to compile the CUDA kernels: nvcc 11.8 to 12, or clang 16 or newer.
cuda_compiler() {
  local candidate release
  if [[ $(nvcc --version 2>/dev/null) =~ release\ ([0-9]+)\.([0-9]+) ]]; then
    release=$((100 * BASH_REMATCH[1] + BASH_REMATCH[2]))
    ((release >= 1108 && release < 1300)) && return
  fi
  for candidate in clang-{19..16} clang; do
    [[ $($candidate --version 2>/dev/null) =~ version\ ([0-9]+) ]] && ((BASH_REMATCH[1] >= 16)) && return
  done
  return 1
}

# In a subshell: what is built goes without the CUDA kernels if there is no compiler to be had, and says so when it is asked for them.
install_cuda_compiler() {
  cuda_compiler || (install clang-19) || say "perturbnas: going on without the CUDA kernels."
}

# dotnet and NuGet keep their caches in the home folder, which containers and build services often lack.
use_writable_home() {
  [ -n "${HOME:-}" ] && [ -w "$HOME" ] && return
  export HOME=$root/build/home
  mkdir -p "$HOME"
}

# Changes whenever a rebuild may be needed: name, size and time of every source file, the commit (it is part of the version), and whether CUDA
# kernels can be built, where they are wanted.
fingerprint() {
  {
    git -C "$root" rev-parse HEAD 2>/dev/null
    [ "$1" = 0 ] || { cuda_compiler && echo 'with CUDA kernels'; }
    find "$root"/{engine,kernels,cli,tests,benchmarks} "$root"/{CMakeLists.txt,Directory.Build.props,.editorconfig,global.json} \
      \( -name bin -o -name obj \) -prune -o -type f -printf '%p %s %T@\n' 2>/dev/null | LC_ALL=C sort
  } | cksum
}

# build_project PROJECT OUTPUT CUDA: a quiet Release build of a project (relative to the root) into OUTPUT, its assembly, with as much of CUDA as
# cuda_wanted says or more, unless that is up to date. Concurrent callers wait for each other.
build_project() {
  local stamp=$root/build/${1//\//-}.stamp log=$root/build/${1//\//-}.log now built
  command -v dotnet >/dev/null || fail "the .NET 10 SDK is missing ('dotnet' is not on the PATH); install it from https://dot.net and start again."
  up_to_date() {
    [ -f "$root/$2" ] && [ -f "$stamp" ] && read -r built now <"$stamp" && ((built >= $3)) && [ "$now" = "$(fingerprint "$built")" ]
  }
  up_to_date "$@" && return
  mkdir -p "$root/build" 2>/dev/null && [ -w "$root/build" ] || fail "cannot write to $root/build; make the folder writable, the program is built there."
  # A subshell, so that the lock ends with it; children do not inherit the lock, some of them outlive the build.
  (
    flock -n 9 || { say "perturbnas: waiting for another build of this folder..." && flock 9; }
    up_to_date "$@" && exit
    install_build_tools 9>&-
    (($3 == 0)) || install_cuda_compiler 9>&-
    say "perturbnas: building..."
    use_writable_home
    # Programs that run at this moment keep the files that they have open; overwriting those in place would crash them.
    rm -f "$root"/{cli,tests}/bin/Release/net10.0/*.{dll,so}
    now=$(fingerprint "$3")
    local switches=('' -p:Cuda=true -p:CudaEmulator=true)
    if ! dotnet build "$root/$1" -c Release -v quiet -nologo --disable-build-servers ${switches[$3]} </dev/null >"$log" 2>&1 9>&-; then
      cat "$log" >&2
      say "perturbnas: the build failed; its output is above."
      exit 1
    fi
    printf '%s %s\n' "$3" "$now" >"$stamp"
  ) 9>"$root/build/lock" || exit $?
}
