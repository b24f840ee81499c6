// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What bench/ holds the engine against, without any engine: a scattered copy and bare round trips;
// and the same round trip through an engine, so that no interpreter stands in either.
#include <poll.h>
#include <sys/socket.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <atomic>
#include <cerrno>
#include <cstring>
#include <vector>

#include "bindings/transfer/handles.hpp"

namespace py = pybind11;

namespace kvxfer::bindings {
namespace {

// Around the caches, where this processor can and the destination is aligned.
void stream(std::byte* to, const std::byte* from, uint64_t nbytes) {
  uint64_t i = 0;
#if defined(__SSE2__)
  if (reinterpret_cast<uintptr_t>(to) % sizeof(__m128i) == 0)
    for (; i + sizeof(__m128i) <= nbytes; i += sizeof(__m128i))
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
#endif
  std::memcpy(to + i, from + i, nbytes - i);
}

// The bound of same-host transports and of block copies: the same scattered copy inside one
// process.
void scattered_copy(const py::object& destination, const py::object& source,
                    const py::object& destination_offsets, const py::object& source_offsets,
                    uint64_t nbytes, bool non_temporal) {
  empty_graveyard();
  Buffers to = take_host_buffers(destination), from = take_host_buffers(source);
  Offsets into("destination_offsets", destination_offsets), out("source_offsets", source_offsets);
  if (!to.writable) fail(Code::kInvalidArgument, "the destination is read-only");
  const Piece &t = to.pieces.at(0), &f = from.pieces.at(0);
  const Column a = into.column(), b = out.column();
  if (a.size != b.size)
    fail(Code::kInvalidArgument, "offsets differ in length: ", a.size, " and ", b.size);
  for (size_t i = 0; i < a.size; ++i)
    for (auto [offset, size] : {std::pair{a[i], t.nbytes}, {b[i], f.nbytes}})
      if (offset < 0 || nbytes > size || static_cast<uint64_t>(offset) > size - nbytes)
        fail(Code::kInvalidArgument, "copy ", i, ": offset ", offset, " + ", nbytes,
             " is out of range");
  const WithoutGil release;
  if (!non_temporal) {
    for (size_t i = 0; i < a.size; ++i) std::memcpy(t.base + a[i], f.base + b[i], nbytes);
    return;
  }
  for (size_t i = 0; i < a.size; ++i) stream(t.base + a[i], f.base + b[i], nbytes);
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

void check_time(int64_t deadline_ns) {
  if (now_ns() > deadline_ns) fail(Code::kTimeout, "the other side of the round trip is silent");
}

// `send` and `take` of one side; the first side's times of each round trip, in seconds.
template <typename Send, typename Take>
std::vector<double> round_trips(bool first, uint64_t rounds, Send&& send, Take&& take) {
  std::vector<double> seconds;
  seconds.reserve(first ? rounds : 0);
  for (uint64_t i = 1; i <= rounds; ++i) {
    if (!first) {
      take(i);
      send(i);
      continue;
    }
    const int64_t began = now_ns();
    send(i);
    take(i);
    seconds.push_back(static_cast<double>(now_ns() - began) / 1e9);
  }
  return seconds;
}

// Two words in memory that both processes map, 128 bytes apart, each written by one side alone.
// Release and acquire: as if they published data, which is what the engine's do.
std::vector<double> memory_round_trips(const py::object& shared, bool first, uint64_t rounds,
                                       double timeout_s) {
  Buffers memory = take_host_buffers(shared);
  const Piece& piece = memory.pieces.at(0);
  if (!memory.writable || piece.nbytes < 256 || reinterpret_cast<uintptr_t>(piece.base) % 128 != 0)
    fail(Code::kInvalidArgument, "need 256 writable bytes, aligned to 128");
  auto word = [&](bool of_first) {
    auto* base = reinterpret_cast<uint64_t*>(piece.base);
    return std::atomic_ref<uint64_t>(base[of_first ? 0 : 16]);
  };
  const int64_t deadline_ns = deadline_after(timeout_s);
  const WithoutGil release;
  return round_trips(
      first, rounds, [&](uint64_t i) { word(first).store(i, std::memory_order_release); },
      [&](uint64_t i) {
        for (uint32_t turns = 1; word(!first).load(std::memory_order_acquire) != i; ++turns)
          if (turns % (1 << 16) == 0) check_time(deadline_ns);
      });
}

void wait_readable(int fd, int64_t deadline_ns) {
  pollfd one{.fd = fd, .events = POLLIN, .revents = 0};
  ::poll(&one, 1, 100);  // an interrupted or timed-out turn looks at the clock and at the fd again
  check_time(deadline_ns);
}

std::vector<double> socket_round_trips(int fd, size_t nbytes, bool first, uint64_t rounds,
                                       bool polling, double timeout_s) {
  std::vector<std::byte> message(nbytes);
  const int64_t deadline_ns = deadline_after(timeout_s);
  const WithoutGil release;
  auto send = [&](uint64_t) {
    if (::send(fd, message.data(), nbytes, MSG_NOSIGNAL) != static_cast<ssize_t>(nbytes))
      fail_errno(Code::kPeerDisconnected, errno, "send of ", nbytes, " bytes failed");
  };
  auto take = [&](uint64_t) {
    for (size_t have = 0; have < nbytes;) {
      const ssize_t n = ::recv(fd, message.data() + have, nbytes - have, MSG_DONTWAIT);
      if (n > 0) {
        have += static_cast<size_t>(n);
      } else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
        fail_errno(Code::kPeerDisconnected, n == 0 ? ECONNRESET : errno, "recv failed");
      } else if (polling) {
        check_time(deadline_ns);
      } else {
        wait_readable(fd, deadline_ns);
      }
    }
  };
  return round_trips(first, rounds, send, take);
}

// Through an engine's public calls. `polling`: the caller looks for messages all the time; else it
// sleeps on the engine's eventfd, as an event loop does.
std::vector<double> notify_round_trips(EngineHandle& self, const PeerPtr& peer, size_t nbytes,
                                       bool first, uint64_t rounds, bool polling,
                                       double timeout_s) {
  empty_graveyard();
  Engine& engine = *self.engine;
  const int64_t deadline_ns = deadline_after(timeout_s);
  const WithoutGil release;
  auto send = [&](uint64_t) {
    SubmitOptions options;
    options.has_notify = true;
    options.notify.resize(nbytes);
    options.deadline_ns = deadline_ns;
    engine.notify(peer, std::move(options));
  };
  auto take = [&](uint64_t) {
    for (;;) {
      if (!polling) engine.clear_wakeup();
      if (!engine.notifications().empty()) return;
      if (polling)
        check_time(deadline_ns);
      else
        wait_readable(engine.fileno(), deadline_ns);
    }
  };
  return round_trips(first, rounds, send, take);
}

}  // namespace

void register_bounds(py::module_& m) {
  m.def("scattered_copy", &scattered_copy, py::arg("destination"), py::arg("source"),
        py::arg("destination_offsets"), py::arg("source_offsets"), py::arg("nbytes"),
        py::arg("non_temporal") = false);
  m.def("memory_round_trips", &memory_round_trips, py::arg("shared"), py::kw_only(),
        py::arg("first"), py::arg("rounds"), py::arg("timeout_s"));
  m.def("socket_round_trips", &socket_round_trips, py::arg("fd"), py::arg("nbytes"), py::kw_only(),
        py::arg("first"), py::arg("rounds"), py::arg("polling"), py::arg("timeout_s"));
  m.def("notify_round_trips", &notify_round_trips, py::arg("engine"), py::arg("peer"),
        py::arg("nbytes"), py::kw_only(), py::arg("first"), py::arg("rounds"), py::arg("polling"),
        py::arg("timeout_s"));
}

}  // namespace kvxfer::bindings
