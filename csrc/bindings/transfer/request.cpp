// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What a request is made of: block views, signals, and the calls that submit.
#include "bindings/transfer/handles.hpp"

namespace py = pybind11;

namespace kvxfer::bindings {
namespace {

LatchPtr latch_of(const py::object& after) {
  if (after.is_none()) return {};
  if (py::isinstance<Latch>(after)) return after.cast<LatchPtr>();
  if (py::isinstance<Transfer>(after)) {
    const auto transfer = after.cast<TransferPtr>();
    check_process(transfer->birth);
    return transfer->latch();
  }
  const std::string given = Py_TYPE(after.ptr())->tp_name;
  for (const char* name : {"cuda_event", "cuda_stream", "__cuda_stream__"})
    if (py::hasattr(after, name))
      raise(Code::kUnavailable, "after= cannot wait for the " + given +
                                    " itself: this build has no CUDA; pass a kvxfer.Signal and "
                                    "enqueue its "
                                    "host_callback() on the stream with cudaLaunchHostFunc");
  raise(Code::kInvalidArgument, "after must be a Transfer or a kvxfer.Signal, not " + given);
}

SubmitOptions submit_options(const py::object& notify, const std::optional<uint64_t>& arrival,
                             const py::object& lease, const Timeout& deadline_s,
                             const py::object& after) {
  SubmitOptions out;
  if (!notify.is_none()) out.has_notify = true, out.notify = from_bytes("notify", notify);
  if (arrival) out.has_arrival = true, out.arrival = *arrival;
  if (!lease.is_none()) out.has_lease = true, out.lease = from_bytes("lease", lease);
  out.deadline_ns = deadline_of(deadline_s, "deadline_s");
  out.after = latch_of(after);
  return out;
}

TransferPtr submit(EngineHandle& self, bool is_read, const RegionHandle& region,
                   const RemoteRegionPtr& remote, const py::object& local_offsets,
                   const py::object& remote_offsets, const py::object& nbytes,
                   const py::object& bases, const py::object& notify,
                   const std::optional<uint64_t>& arrival, const py::object& lease,
                   const Timeout& deadline_s, const py::object& after) {
  Engine& engine = self.get();
  empty_graveyard();
  const Offsets local("local_offsets", local_offsets), into("remote_offsets", remote_offsets),
      size("nbytes", nbytes);
  std::optional<Offsets> pairs;
  SpanArguments arguments{local.column(), into.column(), size.column(), {}, false};
  if (!bases.is_none()) {
    pairs.emplace("bases", bases, Offsets::kPairs);
    arguments.bases = {pairs->data(), pairs->size()};
    arguments.has_bases = true;
  }
  SubmitOptions options = submit_options(notify, arrival, lease, deadline_s, after);
  const WithoutGil release;
  return engine.submit(is_read ? Op::kRead : Op::kWrite, region.region, remote, arguments,
                       std::move(options));
}

TransferPtr submit_blocks(EngineHandle& self, bool is_read, const RegionHandle& region,
                          const RemoteRegionPtr& remote, const BlockView& local_view,
                          const BlockView& remote_view, const py::object& local_blocks,
                          const py::object& remote_blocks, const py::object& notify,
                          const std::optional<uint64_t>& arrival, const py::object& lease,
                          const Timeout& deadline_s, const py::object& after) {
  Engine& engine = self.get();
  empty_graveyard();
  const BlockIdArray from("local_blocks", local_blocks), into("remote_blocks", remote_blocks);
  const BlockArguments arguments{local_view, remote_view, from.ids(), into.ids()};
  SubmitOptions options = submit_options(notify, arrival, lease, deadline_s, after);
  const WithoutGil release;
  return engine.submit(is_read ? Op::kRead : Op::kWrite, region.region, remote, arguments,
                       std::move(options));
}

TransferPtr notify(EngineHandle& self, const PeerPtr& peer, const py::object& payload,
                   const Timeout& deadline_s, const py::object& after) {
  Engine& engine = self.get();
  empty_graveyard();
  SubmitOptions options = submit_options(py::none(), {}, py::none(), deadline_s, after);
  options.has_notify = true, options.notify = from_bytes("payload", payload);
  const WithoutGil release;
  return engine.notify(peer, std::move(options));
}

// Refuses here what no region could hold, so that a mistake shows where it is
// made.
int64_t field(const char* name, const py::object& value, int64_t low) {
  if (PyBool_Check(value.ptr()) || !PyIndex_Check(value.ptr()))
    raise(Code::kInvalidArgument, cat("BlockView: ", name, " must be an int, not ",
                                      std::string(py::str(py::type::of(value).attr("__name__")))));
  const auto whole = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!whole) throw py::error_already_set();
  int overflow = 0;
  const int64_t out = PyLong_AsLongLongAndOverflow(whole.ptr(), &overflow);
  if (overflow != 0 || out < low || out > kMaxOffset)
    raise(Code::kInvalidArgument, cat("BlockView: ", name, " must be ", low, " to 2^61, not ",
                                      std::string(py::str(whole))));
  return out;
}

BlockView make_view(const py::object& base, const py::object& block_stride,
                    const py::object& nbytes, const py::object& num_layers,
                    const py::object& layer_stride) {
  return {field("base", base, 0), field("block_stride", block_stride, 0),
          field("nbytes", nbytes, 1), field("num_layers", num_layers, 1),
          field("layer_stride", layer_stride, 0)};
}

auto fields(const BlockView& v) {
  return py::make_tuple(v.base, v.block_stride, v.nbytes, v.num_layers, v.layer_stride);
}

// For cudaLaunchHostFunc and its like: a C function and its argument. Needs no
// GIL.
void open_latch(void* context) {
  std::unique_ptr<LatchPtr> latch(static_cast<LatchPtr*>(context));
  (*latch)->open();
}

}  // namespace

void register_requests(py::module_& m) {
  py::class_<BlockView>(
      m, "BlockView",
      "A pool of blocks in a region, in bytes: block b of layer l begins at\n"
      "base + b * block_stride + l * layer_stride and has nbytes bytes. Immutable, hashable, and\n"
      "checked against its region when it is used.")
      .def(py::init(&make_view), py::arg("base"), py::arg("block_stride"), py::arg("nbytes"),
           py::arg("num_layers") = 1, py::arg("layer_stride") = 0,
           "Ints, 0 to 2^61; nbytes and num_layers from 1. InvalidArgumentError otherwise.")
      .def_readonly("base", &BlockView::base,
                    "Where block 0 of layer 0 begins, in bytes from the region's start.")
      .def_readonly("block_stride", &BlockView::block_stride, "Bytes from one block to the next.")
      .def_readonly("nbytes", &BlockView::nbytes, "Bytes of one block in one layer.")
      .def_readonly("num_layers", &BlockView::num_layers, "How many layers there are.")
      .def_readonly("layer_stride", &BlockView::layer_stride, "Bytes from one layer to the next.")
      .def("__eq__",
           [](const BlockView& a, const py::object& b) -> py::object {
             if (!py::isinstance<BlockView>(b))
               return py::reinterpret_borrow<py::object>(Py_NotImplemented);
             return py::bool_(fields(a).equal(fields(b.cast<const BlockView&>())));
           })
      .def("__hash__", [](const BlockView& v) { return py::hash(fields(v)); })
      .def("__repr__", [](const BlockView& v) {
        return cat("BlockView(base=", v.base, ", block_stride=", v.block_stride,
                   ", nbytes=", v.nbytes, ", num_layers=", v.num_layers,
                   ", layer_stride=", v.layer_stride, ")");
      });

  py::class_<Latch, LatchPtr>(
      m, "Signal",
      "What after= may wait for: transfers that are given it are \"held\" until it is set.\n\n"
      "Set once and for good, by any thread, or by a CUDA stream through host_callback().")
      .def(py::init([](const py::args& args, const py::kwargs& kwargs) {
        if (!args.empty() || !kwargs.empty())
          throw py::type_error("Signal() takes no arguments; set() sets it");
        return std::make_shared<Latch>();
      }))
      .def("set", &Latch::open, py::call_guard<WithoutGil>(),
           "Lets go what waits. A short lock and a wake-up of the engine; again: nothing happens.")
      .def_property_readonly("is_set", &Latch::settled, "True once it was set.")
      .def(
          "host_callback",
          [](const LatchPtr& latch) {
            auto context = std::make_unique<LatchPtr>(latch);
            return py::make_tuple(reinterpret_cast<uintptr_t>(&open_latch),
                                  reinterpret_cast<uintptr_t>(context.release()));
          },
          "(function, argument): the addresses of a C function void (*)(void *) and its "
          "argument.\n\n"
          "For cudaLaunchHostFunc: the stream sets the signal, without the GIL. Each pair must be\n"
          "called exactly once; it keeps the signal alive until then.")
      .def("__repr__",
           [](const Latch& latch) { return cat("<Signal", latch.settled() ? ", set>" : ">"); });
}

void define_submits(py::class_<EngineHandle>& engine) {
  engine
      .def("submit", &submit, py::arg("is_read"), py::arg("region"), py::arg("remote"),
           py::arg("local_offsets"), py::arg("remote_offsets"), py::arg("nbytes"), py::arg("bases"),
           py::arg("notify"), py::arg("arrival"), py::arg("lease"), py::arg("deadline_s"),
           py::arg("after"))
      .def("submit_blocks", &submit_blocks, py::arg("is_read"), py::arg("region"),
           py::arg("remote"), py::arg("local_view"), py::arg("remote_view"),
           py::arg("local_blocks"), py::arg("remote_blocks"), py::arg("notify"), py::arg("arrival"),
           py::arg("lease"), py::arg("deadline_s"), py::arg("after"))
      .def("notify", &notify, py::arg("peer"), py::arg("payload"), py::arg("deadline_s"),
           py::arg("after"));
}

}  // namespace kvxfer::bindings
