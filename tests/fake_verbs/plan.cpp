// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "plan.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <functional>
#include <set>
#include <stdexcept>
#include <utility>

namespace fake_verbs {
namespace {

using Text = std::string_view;

template <typename T>
using Names = std::initializer_list<std::pair<Text, T>>;

const Names<GidKind> kGids = {{"ll1", GidKind::kLinkLocalV1}, {"ll2", GidKind::kLinkLocalV2},
                              {"v4r1", GidKind::kIpv4V1},     {"v4r2", GidKind::kIpv4V2},
                              {"v6r1", GidKind::kIpv6V1},     {"v6r2", GidKind::kIpv6V2},
                              {"none", GidKind::kEmpty}};

const Names<int> kErrnos = {{"ENOMEM", ENOMEM},      {"EINVAL", EINVAL}, {"EIO", EIO},
                            {"EAGAIN", EAGAIN},      {"EPERM", EPERM},   {"EOPNOTSUPP", EOPNOTSUPP},
                            {"EFAULT", EFAULT},      {"ENODEV", ENODEV}, {"EBUSY", EBUSY},
                            {"EMFILE", EMFILE},      {"ENOSPC", ENOSPC}, {"EACCES", EACCES},
                            {"ETIMEDOUT", ETIMEDOUT}};

const Names<ibv_wc_status> kStatuses = {{"loc_len", IBV_WC_LOC_LEN_ERR},
                                        {"loc_qp_op", IBV_WC_LOC_QP_OP_ERR},
                                        {"loc_eec_op", IBV_WC_LOC_EEC_OP_ERR},
                                        {"loc_prot", IBV_WC_LOC_PROT_ERR},
                                        {"wr_flush", IBV_WC_WR_FLUSH_ERR},
                                        {"mw_bind", IBV_WC_MW_BIND_ERR},
                                        {"bad_resp", IBV_WC_BAD_RESP_ERR},
                                        {"loc_access", IBV_WC_LOC_ACCESS_ERR},
                                        {"rem_inv_req", IBV_WC_REM_INV_REQ_ERR},
                                        {"rem_access", IBV_WC_REM_ACCESS_ERR},
                                        {"rem_op", IBV_WC_REM_OP_ERR},
                                        {"retry_exc", IBV_WC_RETRY_EXC_ERR},
                                        {"rnr_retry_exc", IBV_WC_RNR_RETRY_EXC_ERR},
                                        {"loc_rdd_viol", IBV_WC_LOC_RDD_VIOL_ERR},
                                        {"rem_inv_rd_req", IBV_WC_REM_INV_RD_REQ_ERR},
                                        {"rem_abort", IBV_WC_REM_ABORT_ERR},
                                        {"inv_eecn", IBV_WC_INV_EECN_ERR},
                                        {"inv_eec_state", IBV_WC_INV_EEC_STATE_ERR},
                                        {"fatal", IBV_WC_FATAL_ERR},
                                        {"resp_timeout", IBV_WC_RESP_TIMEOUT_ERR},
                                        {"general", IBV_WC_GENERAL_ERR}};

[[noreturn]] void refuse(Text word, Text why) {
  throw std::invalid_argument("KVXFER_FAKE_VERBS: '" + std::string(word) +
                              "': " + std::string(why));
}

// One word KEY=VALUE, and what its value may be.
struct Word {
  Text word, key, value;

  template <typename T>
  T number(Text text, Text what) const {
    T out{};
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), out);
    if (text.empty() || error != std::errc() || end != text.data() + text.size())
      refuse(word, what);
    return out;
  }
  int whole(int least, int most) const {
    const int out = number<int>(value, "expected a whole number");
    if (out < least || out > most)
      refuse(word, "not within " + std::to_string(least) + " to " + std::to_string(most));
    return out;
  }
  uint64_t count(Text text) const { return number<uint64_t>(text, "expected a whole number"); }
  double probability(Text text) const {
    const double out = number<double>(text, "a probability is a number from 0 to 1");
    if (!(out >= 0 && out <= 1)) refuse(word, "a probability is a number from 0 to 1");
    return out;
  }
  std::pair<Text, Text> halves(Text text, char separator, Text form) const {
    const size_t at = text.find(separator);
    if (at == Text::npos) refuse(word, form);
    return {text.substr(0, at), text.substr(at + 1)};
  }
  int64_t duration(Text text) const {
    const Text form = "a time is a whole number and us, ms or s";
    const size_t digits = text.find_first_not_of("0123456789");
    if (digits == Text::npos) refuse(word, form);
    const Text unit = text.substr(digits);
    const int64_t scale = unit == "us"   ? 1'000
                          : unit == "ms" ? 1'000'000
                          : unit == "s"  ? 1'000'000'000
                                         : 0;
    const auto n = number<uint32_t>(text.substr(0, digits), form);
    if (scale == 0 || n > 1'000'000) refuse(word, form);
    return n * scale;
  }
  Chance chance() const {
    const auto [often, length] = halves(value, ':', "expected PROBABILITY:TIME");
    return {probability(often), duration(length)};
  }
  template <typename T>
  T named(const Names<T>& names, Text text) const {
    for (const auto& [name, out] : names)
      if (name == text) return out;
    std::string known;
    for (const auto& [name, out] : names) known += (known.empty() ? "" : " ") + std::string(name);
    refuse(word, "known are " + known);
  }
  // Each part of a comma-separated value.
  void each(const std::function<void(Text)>& f) const {
    for (Text rest = value;;) {
      const size_t at = std::min(rest.find(','), rest.size());
      f(rest.substr(0, at));
      if (at == rest.size()) return;
      rest.remove_prefix(at + 1);
    }
  }
};

void read_fail(Plan& p, const Word& w) {
  w.each([&](Text part) {
    const Text form = "expected VERB@N:ERRNO";
    const auto [verb, rest] = w.halves(part, '@', form);
    const auto [at, err] = w.halves(rest, ':', form);
    p.fail[std::string(verb)] = {w.count(at), w.named(kErrnos, err)};
  });
}

Plan::Error error_of(const Word& w) {
  const auto [often, status] = w.halves(w.value, ':', "expected PROBABILITY:STATUS or :any");
  Plan::Error error;
  error.probability = w.probability(often);
  if (status != "any") error.status = w.named(kStatuses, status);
  return error;
}

using Reader = void (*)(Plan&, const Word&);
const std::map<Text, Reader> kReaders = {
    {"devices", [](Plan& p, const Word& w) { p.devices = w.whole(0, 16); }},
    {"ports", [](Plan& p, const Word& w) { p.ports = w.whole(1, 4); }},
    {"host", [](Plan& p, const Word& w) { p.host = w.whole(1, 254); }},
    {"link",
     [](Plan& p, const Word& w) {
       p.infiniband = w.named<bool>({{"ib", true}, {"eth", false}}, w.value);
     }},
    {"gids",
     [](Plan& p, const Word& w) {
       p.gids.clear();
       w.each([&](Text part) { p.gids.push_back(w.named(kGids, part)); });
     }},
    {"mtu",
     [](Plan& p, const Word& w) {
       p.mtu = w.named<int>(
           {{"256", 256}, {"512", 512}, {"1024", 1024}, {"2048", 2048}, {"4096", 4096}}, w.value);
     }},
    {"sysfs", [](Plan& p, const Word& w) { p.sysfs = w.value; }},
    {"down",
     [](Plan& p, const Word& w) {
       w.each([&](Text part) { p.down.push_back(w.number<int>(part, "expected rail numbers")); });
     }},
    {"max_qp", [](Plan& p, const Word& w) { p.max_qp = w.whole(0, 4096); }},
    {"max_qp_wr", [](Plan& p, const Word& w) { p.max_qp_wr = w.whole(1, 1 << 16); }},
    {"max_sge", [](Plan& p, const Word& w) { p.max_sge = w.whole(1, 256); }},
    {"max_inline", [](Plan& p, const Word& w) { p.max_inline = w.whole(0, 4096); }},
    {"max_cqe", [](Plan& p, const Word& w) { p.max_cqe = w.whole(1, 1 << 22); }},
    {"max_mr", [](Plan& p, const Word& w) { p.max_mr = w.whole(0, 1 << 20); }},
    {"max_mr_size", [](Plan& p, const Word& w) { p.max_mr_size = w.count(w.value); }},
    {"max_rd_atomic", [](Plan& p, const Word& w) { p.max_rd_atomic = w.whole(0, 128); }},
    {"soft_roce", [](Plan& p, const Word& w) { p.soft_roce = w.whole(0, 1) == 1; }},
    {"windows", [](Plan& p, const Word& w) { p.windows = w.whole(0, 3); }},
    {"memlock", [](Plan& p, const Word& w) { p.memlock = w.count(w.value); }},
    {"hold_reg", [](Plan& p, const Word& w) { p.hold_reg = w.count(w.value); }},
    {"flush", [](Plan& p, const Word& w) { p.flush = w.whole(0, 1) == 1; }},
    {"dmabuf", [](Plan& p, const Word& w) { p.dmabuf = w.whole(0, 1) == 1; }},
    {"dmabuf_windows", [](Plan& p, const Word& w) { p.dmabuf_windows = w.whole(0, 1) == 1; }},
    {"by_hand", [](Plan& p, const Word& w) { p.by_hand = w.whole(0, 1) == 1; }},
    {"peermem", [](Plan& p, const Word& w) { p.peermem = w.whole(0, 1) == 1; }},
    {"lie", [](Plan& p, const Word& w) { p.lie = w.probability(w.value); }},
    {"seed", [](Plan& p, const Word& w) { p.seed = w.count(w.value); }},
    {"delay", [](Plan& p, const Word& w) { p.delay = w.chance(); }},
    {"duplicate", [](Plan& p, const Word& w) { p.duplicate = w.chance(); }},
    {"drop", [](Plan& p, const Word& w) { p.drop = w.probability(w.value); }},
    {"lose_ack", [](Plan& p, const Word& w) { p.lose_ack = w.probability(w.value); }},
    {"post", [](Plan& p, const Word& w) { p.post = w.probability(w.value); }},
    {"bind", [](Plan& p, const Word& w) { p.bind = w.probability(w.value); }},
    {"invalidate", [](Plan& p, const Word& w) { p.invalidate = w.probability(w.value); }},
    {"short_poll", [](Plan& p, const Word& w) { p.short_poll = w.probability(w.value); }},
    {"hold_cqe", [](Plan& p, const Word& w) { p.hold_cqe = w.chance(); }},
    {"error", [](Plan& p, const Word& w) { p.error = error_of(w); }},
    {"read_error", [](Plan& p, const Word& w) { p.read_error = error_of(w); }},
    {"fail", read_fail},
    {"remove", [](Plan& p, const Word& w) { p.remove = w.count(w.value); }},
    {"qp_fatal", [](Plan& p, const Word& w) { p.qp_fatal = w.count(w.value); }},
    {"port_down",
     [](Plan& p, const Word& w) {
       const auto [at, length] = w.halves(w.value, ':', "expected N:TIME");
       p.port_down = w.count(at);
       p.port_up_ns = w.duration(length);
     }},
};

}  // namespace

Plan parse_plan(Text text, int devices) {
  Plan plan;
  plan.devices = devices;
  plan.text = text;
  std::set<Text> seen;
  while (!text.empty()) {
    const size_t end = std::min(text.find(' '), text.size());
    Word w{text.substr(0, end), {}, {}};
    text.remove_prefix(std::min(end + 1, text.size()));
    if (w.word.empty()) continue;
    std::tie(w.key, w.value) = w.halves(w.word, '=', "expected KEY=VALUE");
    const auto reader = kReaders.find(w.key);
    if (reader == kReaders.end()) {
      std::string known;
      for (const auto& [key, unused] : kReaders) known += " " + std::string(key);
      refuse(w.word, "known are" + known);
    }
    if (!seen.insert(w.key).second) refuse(w.word, "given twice");
    reader->second(plan, w);
  }
  return plan;
}

}  // namespace fake_verbs
