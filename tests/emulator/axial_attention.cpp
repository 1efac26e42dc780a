// The kernels of csrc/axial_attention.cu on host memory, for tests/ops/test_axial_attention_cuda.py.
#include "../../csrc/axial_attention.cu"

using namespace vimpac::axial;

extern "C" {

struct Arguments {
  const char *grad, *qkv, *cls_qkv;
  const uint8_t* pad;
  const int64_t* seed;
  char* out;
  float *parts, *clip_sums, *sums;
  int64_t qkv_bytes, cls_qkv_bytes;  // from the addresses given
  int64_t sizes[7], strides[7], cls_strides[4];
  double dropout_p;
  const char* axes;  // letters
  int32_t bfloat, cls_in_context, forward, splits;  // splits: 0 for the launch's own
};

static std::string message;

static Launch launch_of(const Arguments& a) {
  std::vector<std::string> axes;
  for (const char* axis = a.axes; *axis; ++axis) axes.emplace_back(1, *axis);
  Launch launch(a.forward, a.sizes, a.strides, a.cls_strides, axes, a.dropout_p, a.cls_in_context);
  if (a.splits) launch.call.splits = a.splits;
  return launch;
}

int64_t parts(const Arguments* a) { return launch_of(*a).parts(); }
uint64_t bytes_loaded() { return emulator::bytes_loaded; }
uint64_t bytes_stored() { return emulator::bytes_stored; }

// What went wrong, "" if nothing did.
const char* run(const Arguments* a) {
  Launch launch = launch_of(*a);
  message = launch.unfit;
  if (!message.empty()) return message.c_str();
  Call& call = launch.call;
  call.grad = a->grad, call.qkv = a->qkv, call.cls_qkv = a->cls_qkv, call.pad = a->pad, call.seed = a->seed;
  call.out = a->out, call.parts = a->parts, call.clip_sums = a->clip_sums, call.sums = a->sums;
  int64_t row_bytes = a->sizes[5] * a->sizes[6] * 2, rows = call.tokens() + call.clips;
  emulator::forget_buffers();
  emulator::buffer(a->qkv, a->qkv_bytes, false);
  emulator::buffer(a->cls_qkv, a->cls_qkv_bytes, false);
  emulator::buffer(a->grad, rows * row_bytes, false);
  emulator::buffer(a->pad, call.tokens(), false);
  emulator::buffer(a->seed, 8, false);
  emulator::buffer(a->out, rows * row_bytes * launch.written(), true);
  emulator::buffer(a->parts, launch.parts() * 4, true);
  if (!a->forward) {
    emulator::buffer(a->clip_sums, int64_t{4} * call.clips * launch.columns(), true);
    emulator::buffer(a->sums, int64_t{4} * launch.columns(), true);
  }
  Kernels kernels = a->bfloat ? kernels_of<vimpac::warp::BFloat16>(a->forward, launch.width, launch.longest)
                              : kernels_of<vimpac::warp::Float16>(a->forward, launch.width, launch.longest);
  bool done = emulator::launch(static_cast<unsigned>(launch.warps()), 32, [&] { kernels.main(call); }) &&
              emulator::launch(launch.blocks_of_parts(), ADDERS, [&] { kernels.add_parts(call, launch.kinds, launch.width); }) &&
              (a->forward || emulator::launch(launch.blocks_of_sums(), 32, [&] { add_clips(call, launch.columns()); }));
  message = done ? "" : emulator::error;
  return message.c_str();
}
}
