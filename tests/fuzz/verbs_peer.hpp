// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A verbs connection and, at its other end, a peer that the input moves: it has queue pairs of its
// own and says what it likes over them, in whole messages or in fragments. By itself it only joins
// queue pairs that both sides have told of, so that there is something to break.
#pragma once

#include <array>
#include <cerrno>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "common/error.hpp"
#include "fake_verbs.h"
#include "verbs_host.hpp"

namespace kvxfer::fuzz {

class VerbsPeer {
 public:
  // Kinds of its queue pairs.
  enum Kind : uint8_t { kControl, kPull, kSource, kWriter, kSink, kNumKinds };
  static constexpr size_t kMaxRails = 2, kMemoryBytes = 64 * 1024;
  struct Setup {
    size_t num_rails = 1;
    bool push = false;
    verbs::Side side = verbs::Side::kAccepting;  // of our engine
  };
  struct Head {  // of a fragment
    uint32_t type = 0, nbytes = 0, received = 0, number = 0;
  };
  // What our engine has told of a queue pair.
  struct Told {
    uint32_t epoch = 0;
    verbs::QpEnd end{};
  };
  // A request of ours, as far as the peer remembers it.
  struct Heard {
    verbs::RequestHead head;
    std::vector<verbs::Segment> segments;  // the last that came
  };

  VerbsPeer(VerbsHost& host, const Setup& setup) : host_(host), num_rails_(setup.num_rails) {
    std::memset(theirs().memory.data(), static_cast<int>(kTheirs), kMemoryBytes);
    cq_.reset(verbs::api().create_cq(device().context(), kNumEntries, nullptr, nullptr, 0));
    FUZZ_CHECK(cq_ != nullptr);
    verbs::Ends ends{verbs::Channel::kMaxBuffers, address(), {}};
    for (size_t rail = 0; rail < num_rails_; ++rail) {
      verbs::RailEnd& end = ends.rails.emplace_back();
      end.pull = fresh(kPull, rail);
      end.source = fresh(kSource, rail);
      end.control = fresh(kControl, rail);
      end.word_rkey = key();
      end.served = end.issued = kReads;
    }
    connection_ = std::make_shared<verbs::VerbsConnection>(
        host, verbs::Devices(num_rails_, VerbsHost::devices()[0]), false, host.memory,
        setup.push ? "" : "pushes are off");
    const verbs::Ends ours = connection_->ends();
    Incarnation incarnation;
    incarnation.fill(kTheirs);
    connection_->connect(setup.side, std::vector(num_rails_, theirs().to_them), ends, incarnation);
    for (size_t rail = 0; rail < num_rails_; ++rail) {
      const verbs::RailEnd& end = ours.rails[rail];
      for (const verbs::QpEnd& each : {end.pull, end.source, end.control})
        numbers_.push_back(each.number);
      join(kSource, rail, end.pull);
      join(kPull, rail, end.source);
      join(kControl, rail, end.control);
      told_[kSource][rail].end = end.source;
    }
    connection_->start();
    work();
  }
  ~VerbsPeer() {
    // Nobody but us knows the connection any more, and the device has nothing left of it.
    FUZZ_CHECK(connection_.use_count() == 1);
    connection_.reset();
    for (auto& kind : ends_)
      for (End& end : kind) end.qp.reset();
    cq_.reset();
    for (const char* what : {"qps", "cqs", "windows"}) FUZZ_CHECK(fake_verbs_count(what) == 0);
  }

  verbs::VerbsConnection& connection() noexcept { return *connection_; }
  size_t num_rails() const noexcept { return num_rails_; }
  // Its memory, and the key that lets anybody read and write it.
  static uint64_t address() { return reinterpret_cast<uint64_t>(theirs().memory.data()); }
  static uint32_t key() { return theirs().shown.rkeys()[0]; }
  const Told& told(Kind kind, size_t rail) const noexcept { return told_[kind][rail]; }
  const Heard& heard(uint32_t slot) const noexcept { return heard_[slot % heard_.size()]; }
  // Of ours, of which it was told last.
  uint64_t our_address = 0, our_window = 0;
  uint32_t our_key = 0, our_window_key = 0;
  uint64_t our_window_lease = 0;
  Ticket last{0, 1};  // of a request of ours
  uint32_t sent() const noexcept { return sent_; }
  uint32_t received() const noexcept { return received_; }
  uint32_t our_turn() const noexcept { return turn_; }

  // The NICs do what they can.
  void move() {
    ibv_wc completions[32];
    for (int n; (n = ibv_poll_cq(cq_.get(), 32, completions)) > 0;)
      for (int i = 0; i < n; ++i)
        if (completions[i].status == IBV_WC_SUCCESS && completions[i].wr_id >= kReceive)
          came_.push_back(
              {static_cast<uint32_t>(completions[i].wr_id - kReceive), completions[i].byte_len});
  }
  // So does our engine.
  void work() {
    move();
    host_.reactor().round();
    host_.reactor().round();
    host_.look();
  }

  // What it says.
  void message(verbs::Type type, std::initializer_list<ByteView> parts) {
    Bytes body;
    for (const ByteView& part : parts) body.insert(body.end(), part.begin(), part.end());
    body.resize(std::min<size_t>(body.size(), verbs::kMaxMessageBytes));
    for (size_t at = 0; at == 0 || at < body.size(); at += kRoom)
      fragment({static_cast<uint32_t>(type), static_cast<uint32_t>(body.size()), received_, sent_},
               ByteView(body).subspan(at, std::min(kRoom, body.size() - at)));
  }
  void fragment(const Head& head, ByteView rest) {
    say(carrier_, head, rest);
    ++sent_;
  }
  // Over this rail, not as part of the stream.
  void say(size_t rail, const Head& head, ByteView rest) {
    const End& control = ends_[kControl][rail];
    if (!control.joined) return;
    std::byte* const at = buffer(next_send_++ % kNumSends);
    std::memcpy(at, &head, sizeof head);
    const size_t n = std::min(rest.size(), kRoom);
    if (n > 0) std::memcpy(at + sizeof head, rest.data(), n);
    ibv_send_wr wr{};
    wr.opcode = IBV_WR_SEND;
    post(control, wr, at, static_cast<uint32_t>(sizeof head + n));
  }
  void carry_on(size_t rail) noexcept { carrier_ = rail; }

  // A fresh queue pair in the place of the one it had, joined to what our engine has told of.
  verbs::QpEnd fresh(Kind kind, size_t rail) {
    static constexpr Kind kOther[] = {kControl, kSource, kPull, kSink, kWriter};
    End& end = ends_[kind][rail];
    end = {};
    verbs::QpShape shape{.max_send = 4 * kNumSends, .max_recv = kNumReceives};
    end.qp = verbs::make_qp(device(), cq_.get(), shape,
                            IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE);
    end.psn = 7;
    for (uint32_t i = 0; kind == kControl && i < kNumReceives; ++i) receive(rail, i);
    for (uint32_t i = 0; kind == kSink && i < kNumReceives; ++i) {
      ibv_recv_wr wr{}, *bad = nullptr;
      FUZZ_CHECK(ibv_post_recv(end.qp.get(), &wr, &bad) == 0);
    }
    if (const Told& other = told_[kOther[kind]][rail];
        other.end.number != 0 && kind != kSource && kind != kSink)
      join(kind, rail, other.end);
    return {end.qp->qp_num, end.psn};
  }
  // What its own NIC is told to do with our memory.
  void rdma(Kind kind, size_t rail, ibv_wr_opcode opcode, uint64_t to, uint32_t rkey,
            uint32_t nbytes, uint32_t immediate) {
    const End& end = ends_[kind][rail];
    if (!end.joined) return;
    ibv_send_wr wr{};
    wr.opcode = opcode;
    wr.imm_data = immediate;
    wr.wr.rdma = {to, rkey};
    post(end, wr, theirs().memory.data(), std::min<uint32_t>(nbytes, kMemoryBytes));
  }

  // Takes what our engine says, and posts its buffers again.
  void hear() {
    move();
    for (; !came_.empty(); came_.pop_front()) {
      const auto [number, nbytes] = came_.front();
      const size_t rail = number / kNumReceives;
      Reader reader(ByteView(buffer(kNumSends + number), nbytes));
      const auto head = reader.get<Head>();
      if (head.type == static_cast<uint32_t>(verbs::Type::kResume)) {
        turn_ = head.number;
        carrier_ = rail;
      } else {
        ++received_;
        if (fragments_ == 0) {
          const size_t num = (head.nbytes + kRoom - 1) / kRoom;
          fragments_ = std::max(static_cast<uint32_t>(num), 1u);
          on_message(static_cast<verbs::Type>(head.type), reader);
        }
        --fragments_;
      }
      receive(rail, number % kNumReceives);
    }
  }

  // One of our engine's queue pairs: packets to it wait, or come again, or it fails.
  uint32_t our_number(size_t i) const noexcept { return numbers_[i % numbers_.size()]; }
  void hold(uint32_t number) {
    fake_verbs_hold(number);
    held_.push_back(number);
  }

  // The end: what is to be quiet becomes so within a second, whatever the peer has left undone.
  void leave() {
    for (const uint32_t number : held_) fake_verbs_release(number);
    work();
    FUZZ_CHECK(!connection_->describe().empty());  // whatever state it is in
    for (uint64_t id = 0; id < host_.num_ours(); ++id) host_.cancel(*connection_, id);
    host_.close_all();
    connection_->lease_closed();
    work();
    for (int i = 0; i < 4 && !host_.all_quiet(); ++i) {
      host_.pass_time(260'000'000);
      work();
    }
    FUZZ_CHECK(host_.all_quiet());
    connection_->close({.code = Code::kCancelled, .text = "the engine closes"});
    work();
    FUZZ_CHECK(host_.is_lost() && host_.all_quiet());
    move();  // what is still on its way finds nobody
  }

 private:
  static constexpr uint32_t kNumSends = 128, kNumReceives = 96, kNumEntries = 8192;
  static constexpr size_t kFragment = verbs::Channel::kFragmentBytes;
  static constexpr size_t kRoom = kFragment - sizeof(Head);
  static constexpr uint64_t kReceive = 1'000'000;  // wr_id of the first receive
  static constexpr uint8_t kReads = 16;
  struct End {
    verbs::QpPtr qp;
    uint32_t psn = 0;
    bool joined = false;
  };
  struct Theirs {
    verbs::Devices devices = open_devices();
    Bytes memory{kMemoryBytes};
    Bytes buffers{(kNumSends + kMaxRails * kNumReceives) * kFragment};
    verbs::Registration shown{
        devices, memory.data(), memory.size(),
        IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE, "memory"};
    verbs::Registration mine{devices, buffers.data(), buffers.size(), IBV_ACCESS_LOCAL_WRITE,
                             "buffers"};
    verbs::Route to_us = route(*devices[0], *VerbsHost::devices()[0]);
    verbs::Route to_them = route(*VerbsHost::devices()[0], *devices[0]);
    static verbs::Route route(const verbs::Device& from, const verbs::Device& to) {
      std::string reason;
      const auto path = verbs::choose_path(from.address(), to.address(), -1, reason);
      FUZZ_CHECK(path.has_value());
      verbs::Route out;
      out.path = *path;
      return out;
    }
  };
  static Theirs& theirs() {
    static Theirs theirs;
    return theirs;
  }
  static const verbs::Device& device() { return *theirs().devices[0]; }
  static std::byte* buffer(size_t number) { return theirs().buffers.data() + number * kFragment; }

  void post(const End& end, ibv_send_wr& wr, std::byte* from, uint32_t nbytes) {
    const bool is_mine = wr.opcode == IBV_WR_SEND;
    ibv_sge sge{reinterpret_cast<uint64_t>(from), nbytes,
                (is_mine ? theirs().mine : theirs().shown).lkeys()[0]};
    wr.sg_list = &sge;
    wr.num_sge = 1;
    wr.send_flags = IBV_SEND_SIGNALED;
    ibv_send_wr* bad = nullptr;
    // It has no room, or has failed: then the peer has broken it.
    const int err = ibv_post_send(end.qp.get(), &wr, &bad);
    FUZZ_CHECK(err == 0 || err == ENOMEM || err == EINVAL);
    move();
  }
  void receive(size_t rail, uint32_t i) {
    const auto number = static_cast<uint32_t>(rail * kNumReceives + i);
    ibv_sge sge{reinterpret_cast<uint64_t>(buffer(kNumSends + number)), kFragment,
                theirs().mine.lkeys()[0]};
    ibv_recv_wr wr{}, *bad = nullptr;
    wr.wr_id = kReceive + number;
    wr.sg_list = &sge;
    wr.num_sge = 1;
    (void)ibv_post_recv(ends_[kControl][rail].qp.get(), &wr, &bad);  // a fresh one has them all
  }
  void join(Kind kind, size_t rail, const verbs::QpEnd& to) {
    End& end = ends_[kind][rail];
    if (!end.qp || end.joined || to.number == 0) return;
    verbs::connect_qp(device(), end.qp.get(), theirs().to_us, to, end.psn, kReads,
                      kind == kPull ? kReads : 0);
    end.joined = true;
  }
  void on_queue_pair(Kind kind, Reader& reader) {
    const auto head = reader.get<verbs::QpHead>();
    FUZZ_CHECK(reader.ok() && head.rail < num_rails_);
    told_[kind][head.rail] = {head.epoch, {head.number, head.psn}};
    if (head.number != 0) numbers_.push_back(head.number);
    if (kind == kPull) join(kSource, head.rail, {head.number, head.psn});
    if (kind == kWriter) join(kSink, head.rail, {head.number, head.psn});
    if (kind == kControl) join(kControl, head.rail, {head.number, head.psn});
  }
  // What our engine says makes sense; and the peer remembers the last of each kind.
  void on_message(verbs::Type type, Reader& reader) {
    using verbs::Type;
    switch (type) {
      case Type::kRequest: {
        const auto head = reader.get<verbs::RequestHead>();
        FUZZ_CHECK(reader.ok());
        last = head.ticket;
        Heard& heard = heard_[head.ticket.slot % heard_.size()];
        heard.head = head;
        (void)reader.take(head.notify_nbytes);
        return on_list(heard, reader, head.num_rows);
      }
      case Type::kPart: {
        const auto head = reader.get<verbs::ListHead>();
        return on_list(heard_[head.ticket.slot % heard_.size()], reader, head.num_rows);
      }
      case Type::kGranted: {
        const auto head = reader.get<verbs::GrantHead>();
        our_address = head.region.address;
        our_key = reader.u32();
        return;
      }
      case Type::kWindow: {
        const auto head = reader.get<verbs::WindowHead>();
        our_window = head.address;
        our_window_lease = head.window;
        return;
      }
      case Type::kWindowKey:
        our_window_key = reader.get<verbs::WindowKeyHead>().key;
        return;
      case Type::kNewSource:
        return on_queue_pair(kSource, reader);
      case Type::kNewPuller:
        return on_queue_pair(kPull, reader);
      case Type::kNewSink:
        return on_queue_pair(kSink, reader);
      case Type::kNewPusher:
        return on_queue_pair(kWriter, reader);
      case Type::kNewControl:
        return on_queue_pair(kControl, reader);
      default:
        FUZZ_CHECK(type >= Type::kCredit && type <= Type::kNewControl);
    }
  }
  void on_list(Heard& heard, Reader& reader, uint32_t num_rows) {
    for (uint32_t row = 0; row < num_rows * num_rails_ && reader.ok(); ++row)
      our_key = reader.u32();
    heard.segments.clear();
    while (reader.remaining() >= sizeof(verbs::Segment))
      heard.segments.push_back(reader.get<verbs::Segment>());
    if (!heard.segments.empty()) our_address = heard.segments[0].address;
  }

  VerbsHost& host_;
  const size_t num_rails_;
  verbs::CqPtr cq_;
  std::array<std::array<End, kMaxRails>, kNumKinds> ends_;
  std::array<std::array<Told, kMaxRails>, kNumKinds> told_{};  // by kind of ours
  std::array<Heard, 8> heard_;                                 // by slot
  std::shared_ptr<verbs::VerbsConnection> connection_;
  std::vector<uint32_t> numbers_, held_;
  std::deque<std::pair<uint32_t, uint32_t>> came_;  // buffer, bytes
  size_t carrier_ = 0;
  uint32_t next_send_ = 0, sent_ = 0, received_ = 0, turn_ = 0;
  uint32_t fragments_ = 0;  // of the message that comes, still to come
};

}  // namespace kvxfer::fuzz
