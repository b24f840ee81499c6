// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/faulty/plan.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <set>
#include <utility>

#include "common/error.hpp"

namespace kvxfer::faulty {
namespace {

constexpr std::array<std::pair<std::string_view, Code>, 11> kCodes = {{
    {"any", Code::kOk},
    {"invalid_argument", Code::kInvalidArgument},
    {"unavailable", Code::kUnavailable},
    {"registration", Code::kRegistration},
    {"transport", Code::kTransport},
    {"peer_disconnected", Code::kPeerDisconnected},
    {"remote_access", Code::kRemoteAccess},
    {"lease", Code::kLease},
    {"timeout", Code::kTimeout},
    {"cancelled", Code::kCancelled},
    {"internal", Code::kInternal},
}};

[[noreturn]] void refuse(std::string_view word, const char* why) {
  fail(Code::kInvalidArgument, "faults: '", word, "': ", why);
}

template <typename T>
T number(std::string_view word, std::string_view text, const char* what) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || text.empty()) refuse(word, what);
  return value;
}

double probability(std::string_view word, std::string_view text) {
  const auto value = number<double>(word, text, "a probability is a number from 0 to 1");
  if (!(value >= 0 && value <= 1)) refuse(word, "a probability is a number from 0 to 1");
  return value;
}

std::pair<std::string_view, std::string_view> halves(std::string_view word, std::string_view text,
                                                     char separator, const char* why) {
  const size_t at = text.find(separator);
  if (at == std::string_view::npos) refuse(word, why);
  return {text.substr(0, at), text.substr(at + 1)};
}

Plan::Delay delay(std::string_view word, std::string_view text) {
  const char* form = "a delay is PROBABILITY:NUMBER and us, ms or s";
  const auto [chance, length] = halves(word, text, ':', form);
  const size_t digits = length.find_first_not_of("0123456789");
  if (digits == std::string_view::npos) refuse(word, form);
  const std::string_view unit = length.substr(digits);
  const int64_t scale = unit == "us"   ? 1'000
                        : unit == "ms" ? 1'000'000
                        : unit == "s"  ? 1'000'000'000
                                       : 0;
  const auto count = number<uint32_t>(word, length.substr(0, digits), form);
  if (scale == 0 || count > 3600) refuse(word, form);
  return {probability(word, chance), count * scale};
}

Code code(std::string_view word, std::string_view text) {
  for (const auto& [name, value] : kCodes)
    if (name == text) return value;
  refuse(word, "no such error code; 'any' takes each in turn");
}

void apply(Plan& plan, std::string_view word, std::string_view key, std::string_view value) {
  if (key == "wrap")
    plan.wrap = value;
  else if (key == "seed")
    plan.seed = number<uint64_t>(word, value, "a seed is a whole number");
  else if (key == "die")
    plan.die = number<uint64_t>(word, value, "the number of a post is a whole number");
  else if (key == "delay")
    plan.delay = delay(word, value);
  else if (key == "delay_end")
    plan.delay_end = delay(word, value);
  else if (key == "reorder")
    plan.reorder = probability(word, value);
  else if (key == "duplicate")
    plan.duplicate = probability(word, value);
  else if (key == "again")
    plan.again = probability(word, value);
  else if (key == "drop")
    plan.drop = probability(word, value);
  else if (key == "lose_ack")
    plan.lose_ack = probability(word, value);
  else if (key == "truncate")
    plan.truncate = probability(word, value);
  else if (key == "error") {
    const auto [chance, name] = halves(word, value, ':', "an error is PROBABILITY:CODE");
    plan.error = {probability(word, chance), code(word, name)};
  } else {
    refuse(word,
           "known are wrap, seed, delay, delay_end, reorder, duplicate, again, drop, lose_ack, "
           "truncate, error and die");
  }
}

}  // namespace

Plan parse_plan(std::string_view text) {
  Plan plan;
  plan.text = text;
  std::set<std::string_view> seen;
  while (!text.empty()) {
    const size_t end = std::min(text.find(' '), text.size());
    const std::string_view word = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    if (word.empty()) continue;
    const auto [key, value] = halves(word, word, '=', "expected KEY=VALUE");
    if (!seen.insert(key).second) refuse(word, "given twice");
    apply(plan, word, key, value);
  }
  if (plan.text.empty())
    fail(Code::kInvalidArgument,
         "the transport 'faulty' is for tests and needs a plan of faults: "
         "kvxfer.testing.faults.Way(name, 'faulty', 'wrap=tcp seed=1 drop=0.1').engine(...) makes "
         "an engine with one");
  if (plan.wrap.empty() || plan.wrap == "faulty")
    fail(Code::kInvalidArgument, "faults: '", plan.text,
         "' does not say which transport to wrap; write wrap=tcp, for example");
  return plan;
}

}  // namespace kvxfer::faulty
