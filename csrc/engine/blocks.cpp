// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Block views: two arrays of ids become spans.
#include <algorithm>

#include "engine/spans.hpp"

namespace kvxfer {
namespace {

struct Side {
  const char *view_name, *ids_name;
  const BlockView& view;
  const BlockIds& ids;
  std::string_view region;
  uint64_t region_nbytes;
};

// Where block `id` of the last layer ends; exact for what check_view let pass
// and id <= 2^61.
__extension__ typedef __int128 Wide;
Wide end_of(const BlockView& view, int64_t id) {
  return Wide{view.base} + Wide{id} * view.block_stride +
         Wide{view.num_layers - 1} * view.layer_stride + view.nbytes;
}

void check_view(const Side& side) {
  const BlockView& v = side.view;
  auto check = [&](const char* field, int64_t value, int64_t low) {
    if (value < low || value > kMaxOffset)
      fail(Code::kInvalidArgument, side.view_name, ".", field, " = ", value, " must be ", low,
           " to 2^61");
  };
  check("base", v.base, 0);
  check("block_stride", v.block_stride, 0);
  check("nbytes", v.nbytes, 1);
  check("num_layers", v.num_layers, 1);
  check("layer_stride", v.layer_stride, 0);
  if (end_of(v, 0) > static_cast<Wide>(side.region_nbytes))
    fail(Code::kInvalidArgument, side.view_name, ": block 0 of ", v.num_layers,
         " layer(s) ends past the end of region '", side.region, "' (", side.region_nbytes,
         " bytes): base ", v.base, ", layer_stride ", v.layer_stride, ", nbytes ", v.nbytes);
}

template <typename Id>
void check_ids(const Side& side, std::span<const Id> ids) {
  // The largest id whose block still lies in the region.
  const int64_t room =
      static_cast<int64_t>(static_cast<Wide>(side.region_nbytes) - end_of(side.view, 0));
  const int64_t most = side.view.block_stride == 0 ? kMaxOffset : room / side.view.block_stride;
  bool bad = false;
  for (const Id id : ids) bad |= static_cast<uint64_t>(int64_t{id}) > static_cast<uint64_t>(most);
  if (!bad) return;
  const auto i = static_cast<size_t>(
      std::ranges::find_if(ids, [&](Id id) { return id < 0 || int64_t{id} > most; }) - ids.begin());
  if (ids[i] < 0)
    fail(Code::kInvalidArgument, side.ids_name, "[", i, "] = ", ids[i],
         " is negative; padding of a block table must be cut off");
  fail(Code::kInvalidArgument, side.ids_name, "[", i, "] = ", ids[i],
       " is past the end of region '", side.region, "' (", side.region_nbytes,
       " bytes), whose largest block in this view is ", most);
}

// Ids that differ are ranges that do not overlap, whatever the ids.
bool disjoint(const BlockView& v, const BlockIds& ids) {
  if (v.num_layers == 1) return v.block_stride >= v.nbytes;
  if (v.block_stride < v.nbytes || v.layer_stride < v.nbytes) return false;
  // Layers inside a block, or all blocks of a layer before the next.
  if (Wide{v.num_layers - 1} * v.layer_stride + v.nbytes <= v.block_stride) return true;
  int64_t low = ids[0], high = ids[0];
  for (size_t i = 1; i < ids.size; ++i) low = std::min(low, ids[i]), high = std::max(high, ids[i]);
  return Wide{high - low} * v.block_stride + v.nbytes <= v.layer_stride;
}

template <typename Id>
std::span<const Id> as(const BlockIds& ids) {
  return {static_cast<const Id*>(ids.data), ids.size};
}

void check_overlap(const Side& to) {
  const auto repeat =
      to.ids.wide ? find_repeat(as<int64_t>(to.ids)) : find_repeat(as<int32_t>(to.ids));
  if (repeat)
    fail(Code::kInvalidArgument, to.ids_name, "[", repeat->first, "] and ", to.ids_name, "[",
         repeat->second, "] are both block ", to.ids[repeat->first],
         " of the destination; the result would depend on their order");
  if (disjoint(to.view, to.ids)) return;
  const BlockView& v = to.view;
  std::vector<int64_t> begins(to.ids.size), layers(static_cast<size_t>(v.num_layers));
  for (size_t i = 0; i < begins.size(); ++i) begins[i] = v.base + to.ids[i] * v.block_stride;
  for (size_t l = 0; l < layers.size(); ++l) layers[l] = static_cast<int64_t>(l) * v.layer_stride;
  const auto which = find_overlap({begins.data(), begins.size(), false}, {&v.nbytes, 1, true},
                                  begins.size(), layers);
  if (!which) return;
  const size_t n = begins.size();
  fail(Code::kInvalidArgument, to.view_name, ": blocks ", to.ids[which->first % n], " (layer ",
       which->first / n, ") and ", to.ids[which->second % n], " (layer ", which->second / n,
       ") overlap in the destination: nbytes ", v.nbytes, ", block_stride ", v.block_stride,
       ", layer_stride ", v.layer_stride);
}

template <typename L, typename R>
void build(Expanded& expanded, const BlockView& local, const BlockView& remote,
           std::span<const L> from, std::span<const R> into) {
  SpanBuilder out(expanded, from.size() * static_cast<size_t>(local.num_layers));
  for (int64_t layer = 0; layer < local.num_layers; ++layer) {
    const int64_t at = local.base + layer * local.layer_stride,
                  to = remote.base + layer * remote.layer_stride;
    for (size_t i = 0; i < from.size(); ++i)
      out.add(static_cast<uint64_t>(at + from[i] * local.block_stride),
              static_cast<uint64_t>(to + into[i] * remote.block_stride),
              static_cast<uint64_t>(local.nbytes), static_cast<uint32_t>(i));
  }
  out.finish();
}

}  // namespace

Expanded expand(const BlockArguments& arguments, const Bounds& bounds) {
  const auto& [local, remote, from, into] = arguments;
  const Side here{"local_view", "local_blocks",    local,
                  from,         bounds.local_name, bounds.local_nbytes};
  const Side there{"remote_view", "remote_blocks",    remote,
                   into,          bounds.remote_name, bounds.remote_nbytes};
  if (from.size != into.size)
    fail(Code::kInvalidArgument, "remote_blocks has ", into.size, " entries, but local_blocks has ",
         from.size, "; there must be one source for each destination");
  if (local.nbytes != remote.nbytes || local.num_layers != remote.num_layers)
    fail(Code::kInvalidArgument, "the views disagree: remote_view has nbytes ", remote.nbytes,
         " and num_layers ", remote.num_layers, ", local_view has nbytes ", local.nbytes,
         " and num_layers ", local.num_layers);
  for (const Side& side : {here, there}) {
    check_view(side);
    if (side.ids.wide)
      check_ids(side, as<int64_t>(side.ids));
    else
      check_ids(side, as<int32_t>(side.ids));
  }
  const size_t n = from.size;
  if (static_cast<uint64_t>(local.num_layers) > kMaxSpans ||
      n > kMaxSpans / static_cast<uint64_t>(local.num_layers))
    fail(Code::kInvalidArgument, n, " blocks x ", local.num_layers, " layers are more than ",
         kMaxSpans, " spans in one transfer; split it");
  Expanded out;
  if (n == 0) return out;
  check_overlap(bounds.destination_is_remote ? there : here);

  out.num_given = n * static_cast<uint64_t>(local.num_layers);
  BlockView l = local, r = remote;
  if (l.layer_stride == l.nbytes && r.layer_stride == r.nbytes) {
    // The layers of a block are neighbours on both sides: one piece.
    l.nbytes = r.nbytes = l.nbytes * l.num_layers;
    l.num_layers = r.num_layers = 1;
  }
  if (from.wide && into.wide)
    build(out, l, r, as<int64_t>(from), as<int64_t>(into));
  else if (from.wide)
    build(out, l, r, as<int64_t>(from), as<int32_t>(into));
  else if (into.wide)
    build(out, l, r, as<int32_t>(from), as<int64_t>(into));
  else
    build(out, l, r, as<int32_t>(from), as<int32_t>(into));
  return out;
}

}  // namespace kvxfer
