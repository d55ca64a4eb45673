# diskmill with libguestfs and a prebuilt appliance; see docs/container.md.
#
#   docker build -t diskmill .

FROM rust:1-slim-trixie AS build
WORKDIR /src
COPY . .
# Linked statically: it runs in any image, and does not change with this one's libraries.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    target="$(rustc --print host-tuple)" \
    && RUSTFLAGS='-C target-feature=+crt-static' cargo build --release --locked --target "$target" \
    && install -D "target/$target/release/diskmill" /out/diskmill

FROM debian:stable-slim
LABEL org.opencontainers.image.title="diskmill" \
      org.opencontainers.image.description="Converts disk images, and works on the file systems inside them" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0"

# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        fuse3 guestfish guestfs-tools guestmount libguestfs-xfs libwin-hivex-perl \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/*

COPY --from=build /out/diskmill /usr/local/bin/diskmill

# The appliance is made once, here, and cut to what it needs: its disk is sparse, which layers are not.
# The kernel goes again: the appliance has it, with its modules. Whether it starts is tried below, by the user it is for.
# hadolint ignore=DL3008
RUN appliance=/usr/lib/diskmill/appliance \
    && apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        "linux-image-$(dpkg --print-architecture)" \
    && diskmill fs prepare --into "$appliance" --no-start \
    && { e2fsck -fy "$appliance/root" || [ $? -eq 1 ]; } \
    && resize2fs "$appliance/root" 1G \
    && truncate -s 1G "$appliance/root" \
    && chmod -R a+rX "$appliance" \
    && DEBIAN_FRONTEND=noninteractive apt-get purge -y --auto-remove 'linux-image-*' \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/*

# The program that runs it is QEMU with a processor that is cheap to emulate.
ENV LIBGUESTFS_BACKEND=direct \
    LIBGUESTFS_PATH=/usr/lib/diskmill/appliance \
    LIBGUESTFS_HV=/usr/lib/diskmill/appliance/hv

RUN useradd --create-home --uid 1000 diskmill
USER 1000
WORKDIR /images
# Nothing is left to be found out at run time.
RUN diskmill doctor --boot

ENTRYPOINT ["diskmill"]
CMD ["--help"]
