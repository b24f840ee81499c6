// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Messages move from rail to rail, and the queue pairs that may carry them come and go.
//
//   who finds that the one of the messages has failed     the peer
//   ERR; what had come is taken; destroy
//   over another rail:
//   kResume turn, received    ────────────────────────►   ERR; what had come is taken; destroy
//                             ◄────────────────────────   kResume turn, received; what we have not
//   what the peer has not     ────────────────────────►
//   both, of the rail that was left, when its READs come: kNewControl epoch+1
//
// Each side has destroyed its old queue pair before it says what it has received, so nothing that
// the other sends again can come twice. Both may begin at once, on different rails: the higher turn
// wins, odd ones are the connecting side's.
#include <utility>

#include "common/error.hpp"
#include "transport/verbs/connection.hpp"

namespace kvxfer::verbs {

void VerbsConnection::on_control(Rail& rail, const ibv_wc& completion) {
  if (channel_.on_completion(rail.number, completion) || rail.control_failed) return;
  const bool lost = completion.status == IBV_WC_RETRY_EXC_ERR;
  rail.control_failed =
      Failure{.code = lost ? Code::kPeerDisconnected : Code::kTransport,
              .text = cat("the control queue pair on ", rail.device->name(),
                          " failed: ", api().wc_status_str(completion.status), " (vendor error ",
                          completion.vendor_err, ")",
                          lost ? ": the peer's host or the network does not answer" : "")};
}

// What has come and was not acted on; also while one of them was stopped.
bool VerbsConnection::take_messages() {
  bool some = false;
  while (!is_dead()) {
    if (const auto resume = channel_.next_resume()) {
      on_resume(*resume);
      some = true;
      continue;
    }
    Type type{};
    switch (channel_.hear(type, body_)) {
      case Heard::kNothing:
        return some;
      case Heard::kMalformed:
        broken("a malformed message");
        return true;
      case Heard::kMessage:
        on_message(type, body_);
        some = true;
    }
  }
  return some;
}

// ERR, what has come is taken, destroyed.
void VerbsConnection::drop_control(Rail& rail) {
  if (!channel_.is_open(rail.number)) return;
  if (channel_.stop(rail.number)) drain(rail, {channel_.marker(rail.number)});
  channel_.close(rail.number);
  rail.control_failed.reset();
  rail.control.store(0, std::memory_order_relaxed);
  host_.reactor().attend(self());  // for what was taken, or held
}

void VerbsConnection::control_failed(Rail& rail, const Failure& why) {
  const bool carried = channel_.rail() == rail.number;
  drop_control(rail);
  // Over one that only stood by the peer may have said that it has left the other.
  if (carried || channel_.is_behind()) move_messages(why);
  if (!is_dead()) renew_control(rail);
}

void VerbsConnection::move_messages(const Failure& why) {
  Rail& left = rails_[channel_.rail()];
  drop_control(left);
  Rail* next = nullptr;
  for (const auto& rail : rails_) {
    if (!channel_.is_ready(rail->number) || rail->down || rail->absent) continue;
    // Best is one whose READs come: where there is none, any that may work.
    const bool better = next == nullptr || (rail->pulls.is_ready() && !next->pulls.is_ready());
    if (better) next = rail.get();
  }
  if (next == nullptr) {
    Failure last = why;
    if (rails_.size() > 1) last.text += "; no other rail could carry the messages";
    return die(last);
  }
  left.last_error = why.text;
  channel_.carry_on(next->number, channel_.next_turn(side_ == Side::kConnecting));
}

void VerbsConnection::on_resume(const Resume& resume) {
  // Left since, or overtaken: who sent it will hear of a higher turn.
  if (!channel_.is_ready(resume.rail) || resume.turn < channel_.turn()) return;
  if (resume.turn > channel_.turn()) {
    Rail& left = rails_[channel_.rail()];
    if (left.number == resume.rail && !channel_.is_waiting())
      return broken("messages that move to where they are");
    if (left.number != resume.rail) drop_control(left);
    channel_.carry_on(resume.rail, resume.turn);
    if (left.number != resume.rail) renew_control(left);
  }
  if (!channel_.resume(resume)) broken("messages that are resumed where they never were");
}

void VerbsConnection::connect_control(Rail& rail, const QpEnd& there) {
  channel_.connect(rail.number, rail.route, there);
  rail.control.store(channel_.number(rail.number), std::memory_order_relaxed);
}

// Where READs come, so that it is not tried on a rail that does not work.
void VerbsConnection::renew_control(Rail& rail) {
  if (rail.down || !rail.pulls.is_ready() || channel_.is_ready(rail.number)) return;
  drop_control(rail);
  ++rail.control_epoch;
  try {
    tell_control(rail, channel_.open(rail.number, rail.control_epoch));
  } catch (const Error& error) {
    rail.last_error = error.what();  // tried again when its READs have failed and come again
  }
}

void VerbsConnection::tell_control(const Rail& rail, const QpEnd& end) {
  channel_.message(Type::kNewControl, {view_of(QpHead{static_cast<uint32_t>(rail.number),
                                                      rail.control_epoch, end.number, end.psn})});
}

// Both sides may make a fresh one at once: those of the higher epoch are joined.
void VerbsConnection::on_new_control(Rail& rail, const QpHead& head) {
  if (head.epoch < rail.control_epoch) return;
  if (channel_.rail() == rail.number) return broken("a queue pair for messages out of order");
  try {
    if (head.epoch > rail.control_epoch) {
      drop_control(rail);
      rail.control_epoch = head.epoch;
      if (rail.down) return;  // a higher epoch will be ours, when the port is back
      tell_control(rail, channel_.open(rail.number, rail.control_epoch));
    }
    if (channel_.is_open(rail.number) && !channel_.is_ready(rail.number))
      connect_control(rail, {head.number, head.psn});
  } catch (const Error& error) {
    rail.last_error = error.what();
    drop_control(rail);
  }
}

}  // namespace kvxfer::verbs
